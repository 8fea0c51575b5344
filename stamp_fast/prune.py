"""The one road: trace, score, select, compact, recalibrate, report."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from os import PathLike
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from . import config
from ._phases import Phases, in_mode
from .budget import Budget
from .checks import check_arguments, check_model, check_prunable
from .cutting import chosen, select_and_cut
from .data import Batches, LossFn, check_forward, cross_entropy, guarded, inputs_given, inputs_of, some_examples
from .errors import ArgumentError
from .graph import trace
from .graph._model import unwrapped
from .graph._optimizers import Optimizers, state_by_parameter
from .graph._snapshot import Snapshot
from .graph._undisturbed import attributes_restored, uncompiled
from .layer_costs import check_faster, priced
from .methods import METHODS, Ranking, Request
from .recalibrate import recalibrate
from .report import PruneReport, by_unit, copy_of, measured, pruning_report, verdicts
from .stamp import MaskGenerator, Settings
from .stamp.mask_generator import check_generator

_RECALIBRATION_BATCHES = 20
_SAMPLE = 256  # examples that method "stamp" conditions its masks on, and that `reconstruction` folds on
_reports: WeakKeyDictionary[nn.Module, PruneReport] = WeakKeyDictionary()


def prune(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    budget: Budget = Budget(macs=0.5),  # noqa: B008  (frozen)
    method: str | Callable[[Request], Ranking] = "stamp",
    generator: MaskGenerator | str | PathLike | None = None,
    steps: int = 20,
    loss_fn: LossFn | None = None,
    reconstruction: bool | None = None,
    optimizer: Optimizers = None,
    example: Any = None,
    keep: Collection[str] = (),
    round_to: int | None = None,
    seed: int | None = None,
    strict: bool = False,
    verify: bool = True,
    force: bool = False,
    progress: bool = True,
) -> nn.Module:
    """Makes `model` physically smaller, in place, with the channels that matter for the loader's data.

    Args:
        model: on one device, with a head for the loader's classes. Training flags are left as they are.
        loader: yields (inputs, targets), or anything that `loss_fn` understands. Inputs may be a list of images.
        budget: fractions of the dense network that may stay. For train_step, latency and memory, which may be amounts
            too ("250 ms", "4 GiB"), the network's layers are measured at a few widths first; what was measured is kept
            for the next time (`config.costs_file`).
        method: "stamp" (the head is fitted, then the gates and the weights that stay are adapted), "taylor",
            "magnitude", "bn_scale", "random"; or one's own, as those in `stamp_fast.methods`.
        generator: for method "stamp", meta-learned for this network by `stamp.meta_train`, or the file it was saved to.
        steps: batches that method "stamp" adapts the weights on, and the gates on the first quarter of them (on all,
            with a generator for structure alone); with a generator 0 will do, too.
        loss_fn: (model, batch) -> scalar loss; default: cross entropy of model(inputs) with targets. It may need the
            model in training mode, like the losses of a detector: sum(model(*batch).values()).
        reconstruction: folds what is removed into the weights that read what stays, by least squares on 256 examples.
            By default method "stamp" does and the others do not.
        optimizer: one or several; their state is cut along with the parameters. For an average of the weights pass
            both to `ChannelGraph.compact` instead.
        example: what one forward takes (tensor, tuple or dict; first dim = batch, or a list of images in a tuple),
            where the batch's first part is not that.
        keep: names of modules or parameters whose channels all stay.
        round_to: widths that are cut stay multiples of it. By default 1, or for a budget that is measured what the
            machine's kernels like.
        seed: makes the result repeatable, for a loader that is; what is measured for a budget differs every time.
        strict: a group that cannot be pruned is an error that lists all such groups with their reasons, not a verdict
            in the report. Outputs of the model, `keep` and layers too narrow to cut are no error.
        verify: compares the smaller network with the masked dense one on the first eight examples, in eval mode; where
            they differ, the error names the group at fault.
        force: with a budget of time also go on where the smaller network would not be faster.
        progress: a progress bar, where it takes over a second.

    Returns:
        The same object. `report(model)` says what was done and why.

    Raises:
        StampFastError: ArgumentError, LoaderError, ModelError, TraceError, BudgetError or CompactionError; the
            message names the culprit, and model and optimizer are as they were.
    """
    reconstruction = method == "stamp" if reconstruction is None else reconstruction
    check_arguments(
        budget,
        method,
        METHODS,
        steps,
        round_to,
        keep,
        optimizer,
        seed,
        loss_fn,
        {
            "strict": strict,
            "verify": verify,
            "force": force,
            "reconstruction": reconstruction,
        },
    )
    generator = check_generator(generator, method, steps)
    network = unwrapped(model)
    device = check_model(network)
    state_by_parameter(network, optimizer)  # an optimizer that cannot be cut is an error now, not after the search
    loss_fn = guarded(loss_fn or cross_entropy)
    settings = Settings() if generator is None else Settings(mode=generator.mode)
    phases = Phases(progress, sum(settings.split(steps)) if method == "stamp" else 0)
    before = Snapshot(network, optimizer, copy_values=True)
    try:
        with config.recording() as ran, phases, uncompiled(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            with phases("load"):
                batches = Batches(loader, device)
                inputs = batches.inputs() if example is None else example
            with phases("trace"), in_mode(network, training=False):
                with attributes_restored(network):  # a cache of the dense network would be taken for a constant
                    needs_training = check_forward(network, batches.first, loss_fn)
                graph = trace(network, inputs)
                graph.protect(keep)
                graph.settle(strict)
                check_prunable(graph)
                if generator is not None:
                    generator.check_fits(graph)
                dense = copy_of(network)
            asked = budget
            if asked.measured():
                with phases("costs"):
                    budget, round_to = priced(graph, asked, round_to, batches.first, loss_fn, inputs)
            # A cache that is filled here would make the smaller network run other operators than the trace.
            with phases("score"), attributes_restored(network), in_mode(network, training=True):
                wanted = method == "stamp" or reconstruction
                sample = _sample(batches, network, loss_fn, example) if wanted else ([], None)
                request = Request(
                    graph=graph,
                    batches=batches,
                    sample=sample,
                    loss_fn=loss_fn,
                    budget=budget,
                    steps=steps,
                    seed=seed,
                    generator=generator,
                    settings=settings,
                    reconstruction=reconstruction,
                    choose=lambda ranked: chosen(graph, ranked, budget, round_to, strict),
                    on_step=phases.advance,
                )
                ranked = (METHODS[method] if isinstance(method, str) else method)(request)
            with in_mode(network, training=False):
                examples = some_examples(inputs, 8) if verify else None
                folds = sample[0] if reconstruction and not ranked.folded else None
                kept, verified = select_and_cut(
                    graph, ranked, budget, round_to, optimizer, strict, folds, examples, phases
                )
            with phases("recalibrate"):
                recalibrate(network, batches.take(_RECALIBRATION_BATCHES), loss_fn, needs_training)
            with phases("measure"):
                of_latency = None if asked.latency is None else inputs
                costs = measured(dense, network, batches.first, loss_fn, bool(asked.measured()), of_latency)
            if not force:
                check_faster(graph, asked, by_unit(graph, kept, costs))
            backends = dict(ran)
    except BaseException:
        before.restore()
        raise
    groups = verdicts(graph, kept, round_to, ranked.floor)
    _reports[network] = pruning_report(
        graph,
        kept,
        groups,
        method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__),
        asked,
        batches,
        costs,
        verified,
        phases.seconds,
        backends,
    )
    return model


def report(model: nn.Module) -> PruneReport:
    """What the last `prune` of this model did.

    Raises:
        ArgumentError: the model was not pruned by `prune` in this process.
    """
    try:
        return _reports[unwrapped(model)]
    except KeyError:
        raise ArgumentError("report: this model was not pruned by stamp_fast.prune in this process") from None


def _sample(
    batches: Batches, network: nn.Module, loss_fn: LossFn, example: Any
) -> tuple[list[Any], torch.Tensor | None]:
    """Inputs of a few forwards, and the classes of their examples where they are known."""
    if example is None:
        return batches.sample(_SAMPLE, inputs_of)
    try:
        return batches.sample(_SAMPLE, lambda batch: inputs_given(network, loss_fn, batch))
    except ArgumentError:  # loss_fn gives some by position and some by name: only the example can be run again
        return [example], None

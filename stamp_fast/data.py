"""What `prune` needs of a loader: batches on the model's device, and a loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from ._phases import in_mode
from .errors import ArgumentError, LoaderError, StampFastError
from .graph._record import batch_size, call_model

LossFn = Callable[[nn.Module, Any], torch.Tensor]


class Batches:
    """Batches of a loader, on one device.

    Raises:
        LoaderError: not an iterable, or it yields nothing.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        try:
            iterator = iter(loader)
        except TypeError:
            raise LoaderError(
                f"loader: expected an iterable of (inputs, targets) batches, got {type(loader).__name__}; "
                "pass a DataLoader, or a list of batches"
            ) from None
        self._loader = loader
        self.device = device
        self._tail = iterator if iterator is loader else None  # a generator: what it has yielded is kept
        self._seen: list[Any] = []
        first = _next(iterator)
        if first is None:
            raise LoaderError("loader: yields no batch; check the data set's length, `drop_last` and the sampler")
        if self._tail is not None:
            self._seen.append(first)
        self._first = first

    @property
    def first(self) -> Any:
        """The first batch; a copy, for a forward may work on it in place."""
        return self._moved(self._first)

    def __iter__(self) -> Iterator[Any]:
        """What the loader yields; of a generator from its beginning, every time."""
        return self._one_pass()

    def __len__(self) -> int:
        return len(self._loader)

    def _moved(self, batch: Any) -> Any:
        return tree_map(lambda v: v.to(self.device, copy=True) if isinstance(v, torch.Tensor) else v, batch)

    def _one_pass(self) -> Iterator[Any]:
        if self._tail is None:
            yield from self._loader
            return
        yield from list(self._seen)
        for batch in self._tail:
            self._seen.append(batch)
            yield batch

    def one_pass(self) -> Iterator[Any]:
        """All batches, once."""
        batches = iter(self._one_pass())
        while (batch := _next(batches)) is not None:
            yield self._moved(batch)

    def length(self) -> int | None:
        """Batches in a pass, as far as the loader says."""
        try:
            return len(self._loader)
        except Exception:  # some loaders have a length that raises; then they do not say
            return None

    def batch_size(self) -> int:
        """Examples in the first batch."""
        return _examples(self._first)

    def take(self, count: int) -> Iterator[Any]:
        """`count` batches from the start, the loader begun anew as often as it takes."""
        given = 0
        while given < count:
            before = given
            batches = islice(self._one_pass(), count - given)
            while (batch := _next(batches)) is not None:
                given += 1
                yield self._moved(batch)
            if given == before:
                raise LoaderError("loader: yields no batch when it is iterated a second time")

    def inputs(self) -> Any:
        """The model's inputs in the first batch: its first part, or the batch where it is a tensor itself.

        A list of images is one argument: (images,).

        Raises:
            ArgumentError: the batch is neither; `example` has to say what the model takes.
        """
        return inputs_of(self.first)

    def sample(self, examples: int, inputs_of: Callable[[Any], Any]) -> tuple[list[Any], torch.Tensor | None]:
        """The model's inputs for the first examples of a pass: so many, or all that it has.

        Args:
            inputs_of: takes the model's inputs out of a batch.

        Returns:
            What each forward takes, and the class indices of all examples, where that is what the batches hold.
        """
        inputs, labels, left = [], [], examples
        batches = iter(self._one_pass())
        while left > 0 and (batch := _next(batches)) is not None:
            moved = self._moved(batch)
            inputs.append(some_examples(inputs_of(moved), left))
            known = _labels(moved)
            labels.append(None if known is None else known[:left])
            left -= _examples(moved)
        return inputs, torch.cat(labels) if all(part is not None for part in labels) else None

    def size(self) -> int:
        """Examples in the data set, or in a pass, as far as the loader says; else in the first batch."""
        with contextlib.suppress(AttributeError, TypeError):
            return len(self._loader.dataset)
        with contextlib.suppress(TypeError):
            return len(self._loader) * self.batch_size()
        return self.batch_size()


def inputs_of(batch: Any) -> Any:
    """What the model takes of a batch, where that can be told by its form."""
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], torch.Tensor):
        return batch[0]
    if isinstance(batch, (tuple, list)) and batch and _is_image_list(batch[0]):
        return (list(batch[0]),)
    raise ArgumentError(
        f"example: the loader yields {type(batch).__name__} batches; pass example=, the input (or tuple or dict of "
        "inputs) of one forward"
    )


def _labels(batch: Any) -> torch.Tensor | None:
    """Class indices, where that is what the second part of a batch of images holds: one for each."""
    images, targets = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
    if not isinstance(targets, torch.Tensor) or not isinstance(images, torch.Tensor):
        return None
    return targets if targets.shape == images.shape[:1] and not targets.is_floating_point() else None


def _examples(batch: Any) -> int:
    if isinstance(batch, (tuple, list)) and batch and _is_image_list(batch[0]):
        return len(batch[0])
    return next((len(t) for t in tree_leaves(batch) if isinstance(t, torch.Tensor) and t.dim()), 1)


def _is_image_list(value: Any) -> bool:
    """Whether this is a batch of images of sizes of their own, as detectors take them."""
    return isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(v, torch.Tensor) for v in value)


def _next(batches: Iterator[Any]) -> Any:
    try:
        return next(batches, None)
    except StampFastError:
        raise
    except Exception as error:
        raise LoaderError(f"loader: raised {type(error).__name__}: {error}") from error


def cross_entropy(model: nn.Module, batch: Any, label_smoothing: float = 0.0) -> torch.Tensor:
    """The default loss: cross entropy of model(inputs) with targets (class indices, or probabilities).

    Raises:
        LoaderError: the batch is not (inputs, targets), or the targets do not fit the model's output.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise LoaderError(
            f"loader: expected (inputs, targets) batches, got {type(batch).__name__}"
            + (f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            + "; for any other batch pass loss_fn=, a function (model, batch) -> loss"
        )
    inputs, targets = batch
    logits = logits_of(model(inputs))
    try:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        shape = tuple(targets.shape) if isinstance(targets, torch.Tensor) else type(targets).__name__
        raise LoaderError(
            f"loader: targets {shape} do not fit the model's output {tuple(logits.shape)}: {error}; "
            "give the model a head for these classes, or pass loss_fn="
        ) from error


def logits_of(output: Any) -> torch.Tensor:
    """The first tensor of what a model returns."""
    while not isinstance(output, torch.Tensor):
        output = next(iter(output.values())) if isinstance(output, dict) else output[0]
    return output


def hits(network: nn.Module, batch: Any) -> tuple[float, int]:
    """Correct answers in a batch of (inputs, class indices), and how many there could be.

    Raises:
        ArgumentError: another batch; it takes a `metric`.
    """
    inputs, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        raise ArgumentError("metric: the default is for batches of (inputs, class indices); pass metric=")
    classes = logits_of(call_model(network, inputs)).argmax(1)
    if classes.shape != labels.shape:
        raise ArgumentError(
            f"metric: the network's classes {tuple(classes.shape)} and the labels {tuple(labels.shape)} differ in "
            "shape; pass metric="
        )
    return (classes == labels).sum().item(), labels.numel()


def guarded(loss_fn: LossFn) -> LossFn:
    """The loss with typed errors, for use on any batch."""

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        try:
            value = loss_fn(model, batch)
        except StampFastError:
            raise
        except Exception as error:
            # What torch's batch norm says of a batch of one; commonly the last one of a data set.
            alone = "more than 1 value per channel" in str(error)
            raise LoaderError(
                f"loader: the model or loss_fn cannot take its batches ({_describe(batch)}): "
                f"{type(error).__name__}: {error}"
                + ("; leave out batches of one example: DataLoader(..., drop_last=True)" if alone else "")
            ) from error
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            raise ArgumentError(f"loss_fn: must return a scalar tensor, got {_describe(value)}")
        if not bool(torch.isfinite(value)):
            raise LoaderError(f"loader: the loss of a batch is {value.item()}; check the inputs for NaN or inf")
        return value

    return loss


def check_forward(model: nn.Module, batch: Any, loss_fn: LossFn) -> bool:
    """Runs a guarded loss once on the first batch: in eval mode and, where that fails, in training mode.

    Returns:
        Whether there is a loss in training mode only, as with detectors.

    Raises:
        LoaderError: the model cannot take the batch, or the loss is not finite.
        ArgumentError: the loss is no scalar, or is cut off from the model's parameters.
    """
    try:
        _check_loss(model, batch, loss_fn, training=False)
        return False
    except StampFastError as error:
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            _check_loss(model, batch, loss_fn, training=True)
            return True
        except StampFastError:
            raise error from error.__cause__
        finally:
            for buffer, value in buffers:
                buffer.copy_(value)


def _check_loss(model: nn.Module, batch: Any, loss_fn: LossFn, training: bool) -> None:
    with torch.enable_grad(), in_mode(model, training):
        loss = loss_fn(model, batch)
    if any(p.requires_grad for p in model.parameters()) and not loss.requires_grad:
        raise ArgumentError("loss_fn: its result does not depend on the model's parameters (detached, or .item()?)")


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(_describe(v) for v in value) + ")"
    return type(value).__name__


class _InputsSeen(BaseException):
    """Stops a forward; not an Exception, which the guard of a loss takes for the user's."""


def inputs_given(model: nn.Module, loss_fn: LossFn, batch: Any) -> Any:
    """What `loss_fn` hands to the model for a batch: a tuple, or a dict where all is given by name.

    Raises:
        ArgumentError: it gives some by position and some by name, or does not call the model.
    """
    seen: list[tuple[tuple, dict]] = []

    def look(_: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))
        raise _InputsSeen

    handle = model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    try:
        with torch.no_grad():
            loss_fn(model, batch)
    except _InputsSeen:
        pass
    finally:
        handle.remove()
    if not seen or all(seen[0]):
        raise ArgumentError("loss_fn: does not call the model by position alone, or by name alone")
    args, kwargs = seen[0]
    return kwargs or args


def some_examples(inputs: Any, count: int) -> Any:
    """The first `count` examples of a batch of inputs: a list of images, or tensors with the batch first.

    Tensors without the batch stay whole.
    """
    arguments = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else ()
    if any(isinstance(a, list) and _is_image_list(a) for a in arguments):
        cut = [a[:count] if isinstance(a, list) else a for a in arguments]
        return dict(zip(inputs, cut, strict=True)) if isinstance(inputs, dict) else type(inputs)(cut)
    batch = batch_size(inputs)
    return tree_map(lambda v: v[:count] if isinstance(v, torch.Tensor) and v.shape[:1] == (batch,) else v, inputs)

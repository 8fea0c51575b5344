"""A search as a program that several processes run: writes FOLDER/rank-N with the best genome and what it scored.

python search_run.py FOLDER [images | metric | loader]: what is another, or fails, in the second process
"""

import sys
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent))

from test_pruning_net import data, net_of  # noqa: E402

from stamp_fast import Budget  # noqa: E402
from stamp_fast.data import hits  # noqa: E402
from stamp_fast.metapruning import PruningNet, search  # noqa: E402


def metric(network, batch):
    if sys.argv[2:] == ["metric"] and distributed.get_rank():
        raise RuntimeError("on purpose")
    return hits(network, batch)


def run(folder: Path | None) -> tuple[str, str]:
    counted = []
    score = PruningNet.score

    def counting(self, *args):
        counted.append(args[0])
        return score(self, *args)

    PruningNet.score = counting
    other = sys.argv[2] if folder is not None and distributed.get_rank() and len(sys.argv) > 2 else ""
    try:
        net = net_of()
        if folder is not None and distributed.get_rank():  # the first one's weights count
            torch.nn.init.zeros_(net.generators["0"].bias)
        net.fit(data(5 if other == "loader" else 4), epochs=2, lr=0.1, progress=False)
        options = {"population": 10, "mutations": 5, "crossovers": 5, "generations": 4, "parents": 4}
        images = data(1, seed=int(other == "images")), data(2)
        path = None if folder is None else folder / "scores.jsonl"
        budget = Budget(macs=0.5)
        found = search(net, *images, budget=budget, metric=metric, checkpoint=path, progress=False, **options)
    finally:
        PruningNet.score = score
    return found.to_json(), str(len(counted))


def main() -> None:
    distributed.init_process_group("gloo")
    folder = Path(sys.argv[1])
    (folder / f"rank-{distributed.get_rank()}").write_text("\n".join(run(folder)))
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

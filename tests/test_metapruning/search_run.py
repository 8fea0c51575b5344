"""A search as a program that several processes run: writes FOLDER/rank-N with the best genome and what it scored."""

import sys
from pathlib import Path

import torch
from torch import distributed

sys.path.insert(0, str(Path(__file__).parent))

from test_pruning_net import data, net_of  # noqa: E402

from stamp_fast import Budget  # noqa: E402
from stamp_fast.metapruning import PruningNet, search  # noqa: E402


def run(folder: Path | None) -> tuple[str, str]:
    counted = []
    score = PruningNet.score

    def counting(self, *args):
        counted.append(args[0])
        return score(self, *args)

    PruningNet.score = counting
    try:
        net = net_of()
        if folder is not None and distributed.get_rank():  # the first one's weights count
            torch.nn.init.zeros_(net.generators["0"].bias)
        net.fit(data(4), epochs=2, lr=0.1, progress=False)
        options = {"population": 10, "mutations": 5, "crossovers": 5, "generations": 4, "parents": 4}
        path = None if folder is None else folder / "scores.jsonl"
        found = search(net, data(1), data(2), budget=Budget(macs=0.5), checkpoint=path, progress=False, **options)
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

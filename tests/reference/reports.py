"""A report of a network of two layers."""

from stamp_fast.report import GroupVerdict, PruneReport

REPORT = PruneReport(
    method="taylor",
    budget={"macs": 0.5, "params": 0.75},
    macs_before=2_000_000,
    macs_after=1_000_000,
    params_before=40_000,
    params_after=10_000,
    train_step_ms_before=12.0,
    train_step_ms_after=8.0,
    peak_memory_before=6_000_000,
    peak_memory_after=3_000_000,
    seconds={"trace": 0.25, "cut": 0.5},
    equality_error=3e-7,
    backends={"pack_weights": "cpu"},
    groups=[
        GroupVerdict("layer1.0.a_rather_long_name_of_a_module.conv1", 64, 20, "pruned"),
        GroupVerdict("fc", 10, 10, "kept", "output of the model"),
    ],
    notes=["the pruned train step is NOT faster"],
    forward_ms_before=4.0,
    forward_ms_after=3.0,
    layer_ms_before={
        "layer1.0.a_rather_long_name_of_a_module.conv1": 9.0,
        "fc": 1.0,
        "(optimizer)": 0.5,
        "(other)": 1.5,
    },
    layer_ms_after={
        "layer1.0.a_rather_long_name_of_a_module.conv1": 5.5,
        "fc": 0.75,
        "(optimizer)": 0.25,
        "(other)": 1.5,
    },
    steps_timed=9,
    batch_size=64,
    steps_per_epoch=50,
    model="Net",
    machine="CPU, 1 thread",
)

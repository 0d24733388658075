"""PyTorch's caching allocator, as its source says and an H200 has shown."""

import pytest

from serve_app.planner.vllm.allocator import merged, unsplit_bytes

MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "unsplit"),
    [
        ([], 0),
        ([512], 0),  # the rest of its segment is split off
        ([500], 12),  # in units of 512 B
        ([20 * MIB], 0),
        ([12 * MIB + 1], 511),  # a segment in steps of 2 MiB; more than 1 MiB is split off
        ([13 * MIB], MIB),  # 1 MiB is not
        ([4 * MIB] * 5, 0),  # five of one segment of 20 MiB
        ([9 * MIB, 9 * MIB, 2 * MIB], 0),  # the third takes all that the first two leave
        ([9 * MIB] * 2 + [int(1.5 * MIB)], MIB // 2),
        ([31_850_496] * 26, 26 * 1_703_936),  # gemma-3-1b's gate_up: 20 MiB or more is never split
    ],
)
def test_what_is_not_split_off_counts_as_allocated(sizes: list[int], unsplit: int) -> None:
    assert unsplit_bytes(sizes) == unsplit


def test_tensors_that_vllm_keeps_as_one_are_allocated_as_one() -> None:
    layer = "model.layers.3."
    for parts in (
        [f"self_attn.{x}_proj.weight" for x in "qkv"],
        [f"mlp.{x}_proj.weight" for x in ("gate", "up")],
        [f"mlp.experts.{n}.down_proj.weight" for n in (0, 127)],
        ["self_attn.q_a_proj.weight", "self_attn.kv_a_proj_with_mqa.weight"],
    ):
        assert len({merged(layer + part) for part in parts}) == 1, parts
    apart = ["self_attn.o_proj.weight", "mlp.down_proj.weight", "self_attn.q_proj.weight"]
    assert len({merged(layer + part) for part in apart}) == 3

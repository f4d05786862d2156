from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch

from dit_sparse import memory as memories
from dit_sparse.blockmask import BlockLayout, BlockMask
from dit_sparse.memory import Memory, State, map_tensors, tensors_of


def random_mask(layout: BlockLayout) -> BlockMask:
    return BlockMask.from_dense(torch.rand(1, 2, layout.blocks, layout.blocks) < 0.5, layout, layout)


def test_a_value_serves_its_steps_and_no_more() -> None:
    memory = Memory()
    memory.put((3, "cond"), "mask", step=10)
    assert [memory.get((3, "cond"), step=step, max_age=4) for step in (10, 11, 13)] == ["mask"] * 3
    assert memory.get((3, "uncond"), step=10, max_age=4) is None
    assert memory.get((4, "cond"), step=10, max_age=4) is None
    assert memory.age((3, "cond"), step=13) == 3
    assert memory.get((3, "cond"), step=14, max_age=4) is None
    assert len(memory) == 0 and memory.age((3, "cond"), step=13) is None


def test_age_counts_steps_not_calls() -> None:
    """A step cache may skip steps and layers: a mask does not grow older by being used, nor younger by a gap."""
    memory = Memory()
    memory.put("key", "mask", step=0)
    assert all(memory.get("key", step=1, max_age=2) for _ in range(10))
    assert memory.get("key", step=7, max_age=2) is None


def test_a_step_before_the_value_was_made_drops_it() -> None:
    memory = Memory()
    memory.put("key", "mask", step=5)
    assert memory.get("key", step=0, max_age=50) is None


def test_another_shape_drops_the_value() -> None:
    memory = Memory()
    memory.put("key", "mask", step=0, shape=(1, 100))
    assert memory.get("key", step=0, max_age=9, shape=(1, 100)) == "mask"
    assert memory.get("key", step=0, max_age=9, shape=(2, 100)) is None and len(memory) == 0


def test_reset_forgets_the_run() -> None:
    memory = Memory()
    memory.put("key", torch.zeros(4), step=0)
    memory.reset()
    assert memory.get("key", step=0, max_age=9) is None and memory.nbytes == 0
    assert memory.peaks["statistics"].total == 16


def test_static_values_are_built_once_and_stay_while_used() -> None:
    memory, built = Memory(), []

    def build(name: str) -> str:
        return memory.static(name, lambda: built.append(name) or name)

    for _ in range(3):  # layers and steps of a run
        build("small")
    memory.reset()  # the run ends
    memory.reset()  # the next begins
    assert build("small") == "small" and built == ["small"]
    memory.reset()
    build("large")
    memory.reset()  # the stretch used only "large"
    build("large")
    build("small")
    assert built == ["small", "large", "small"]
    memory.clear()
    build("large")
    assert built[-1] == "large" and len(built) == 4


def test_bytes_are_counted_once() -> None:
    layout = BlockLayout.from_order(torch.randperm(100), 32)
    memory = Memory()
    assert memory.static("layout", lambda: layout) is layout
    shared = sum(t.untyped_storage().nbytes() for t in layout.tensors())
    assert memory.nbytes == shared
    masks = [random_mask(layout) for _ in range(3)]
    for step, mask in enumerate(masks):
        memory.put(step, {"mask": mask}, step=step)
    own = 4 * (2 * 4 * 4 + 2 * 4 + 2 * 4)
    assert masks[0].nbytes == shared + own
    assert memory.nbytes == shared + 3 * own
    assert memory.device_nbytes == 0  # all of it lies in CPU memory


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


@dataclass
class Holder:
    name: str
    mask: BlockMask
    notes: dict = field(default_factory=dict)


def test_tensors_are_found_and_changed_wherever_they_are() -> None:
    layout = BlockLayout.raster(100, 32)
    untouched = [torch.ones(2)]
    holder = Holder("plan", random_mask(layout), {"a": [torch.zeros(3), Pair(torch.ones(1), 7)], "b": untouched})
    kept = {id(layout.lengths), id(untouched[0])}
    moved = map_tensors(holder, lambda t: t if id(t) in kept else t.clone())
    assert len(list(tensors_of(moved))) == len(list(tensors_of(holder)))
    assert moved.mask is not holder.mask and moved.mask.query is layout and moved.notes["b"] is untouched
    assert torch.equal(moved.mask.to_dense(), holder.mask.to_dense())
    assert isinstance(moved.notes["a"][1], Pair) and moved.notes["a"][1].second == 7
    assert map_tensors(holder, lambda t: t) is holder


def test_offload_moves_what_is_not_shared_and_brings_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta tensors stand in for those of a GPU; the copies in CPU memory are made up."""
    monkeypatch.setattr(memories, "_to_host", lambda t: torch.zeros(t.shape, dtype=t.dtype))
    memory = Memory(offload=True)
    layout = memory.static("layout", lambda: BlockLayout.raster(100, 32, "meta"))
    own = BlockLayout.from_order(torch.zeros(1, 2, 100, dtype=torch.int64, device="meta"), 32, lengths=layout.lengths)
    on_host = torch.zeros(5)
    mask = random_mask(BlockLayout.raster(100, 32)).to("meta").with_layouts(own, layout)
    memory.put("key", (mask, on_host), step=0)

    stored = memory._kept["key"].value[0]
    assert stored.lists.device.type == stored.query.index.device.type == "cpu"
    assert stored.key is layout and stored.query.lengths is layout.lengths
    assert memory.device_nbytes == layout.lengths.untyped_storage().nbytes()
    back, still_on_host = memory.get("key", step=0, max_age=1)
    assert {t.device.type for t in back.tensors()} == {"meta"}
    assert back.key is layout and back.query.lengths is layout.lengths and still_on_host is on_host


def test_offload_on_the_cpu_changes_nothing() -> None:
    memory = Memory(offload=True)
    mask = random_mask(BlockLayout.raster(100, 32))
    memory.put("key", mask, step=0)
    assert memory.get("key", step=0, max_age=1) is mask


def test_a_methods_state_is_told_apart_by_layer_and_branch_and_forgets_with_the_run():
    memory = Memory()
    here, other = State(memory, (3, "cond"), step=4), State(memory, (3, "uncond"), step=4)
    here.keep("lse", torch.ones(8))
    assert other.recall("lse") is None and here.recall("mask") is None
    later = State(memory, (3, "cond"), step=9)
    assert later.recall("lse") is not None and later.age("lse") == 5
    assert memory.nbytes == 32
    assert later.recall("lse", max_age=5) is None, "kept too long ago"
    assert later.recall("lse") is None, "what is too old is dropped"
    here.keep("lse", torch.ones(8))
    memory.reset()
    assert here.recall("lse") is None
    assert State(memory, (3, "cond"), shape="other").recall("lse") is None


def test_a_state_without_a_run_has_a_memory_of_its_own():
    one, two = State(), State()
    one.keep("x", 1)
    assert one.recall("x") == 1 and two.recall("x") is None

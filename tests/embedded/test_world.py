"""The grammar, the tokenizer and the drawing of the embedded model's world."""

import pytest
import torch

from dit_sparse.pipelines.embedded import EXAMPLES, drawing, unknown_words, vocabulary, world


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_grammar_has_what_it_promises():
    assert len(world.COLOURS) == 8 and "black" not in world.COLOURS
    assert len(world.SHAPES) == 8 and len(world.MOTIONS) == 10 and len(world.SIZES) == 3
    assert set(world.RELATIONS) == {"on the left of", "on the right of", "on the top of", "on the bottom of"}
    assert {"moving right", "growing", "rotating clockwise", "bouncing", "standing still"} <= set(world.MOTIONS)
    assert "black" in world.BACKGROUNDS and "drifting" in world.BACKGROUNDS


def test_training_samples_use_every_value():
    spec = world.sample(4000, generator=seeded())
    sizes = dict(colour=8, shape=8, motion=10, back=8, size=3, rel=4, two=2, shape2=8, colour2=8, cam=3)
    for name, count in sizes.items():
        assert spec[name].unique().tolist() == list(range(count)), name
    assert not (spec["colour"] == spec["colour2"]).any()


def test_round_shapes_do_not_rotate():
    spec = world.sample(4000, generator=seeded())
    turns = (spec["motion"] == 6) | (spec["motion"] == 7)
    round_shapes = (spec["shape"] == 0) | (spec["shape"] == 5)
    assert not (turns & round_shapes).any()


def test_training_never_sees_a_held_out_triple():
    assert not world.held_out(world.sample(20_000, generator=seeded())).any()


def test_held_out_split_holds_only_held_out_triples_with_complete_captions():
    spec = world.sample(200, "held", generator=seeded())
    assert len(spec["two"]) == 200 and world.held_out(spec).all()
    assert all("background" in caption for caption in world.captions(spec))
    with pytest.raises(ValueError, match="split"):
        world.sample(3, "test")


def test_token_tables_equal_the_tokenizer():
    tokenizer, tables = vocabulary.build_tokenizer(), world.TokenTables()
    spec = world.sample(300, generator=seeded())
    for rows in (spec, world.still(spec)):
        captions = world.captions(rows)
        text = tokenizer(captions, padding="max_length", max_length=world.TEXT_LENGTH, return_tensors="pt")
        assert torch.equal(text.input_ids, tables(rows))
        assert torch.equal(text.attention_mask, (tables(rows) != 0).long())


def test_tokenizer_round_trip_and_unknown_words():
    tokenizer = vocabulary.build_tokenizer()
    for caption in (*EXAMPLES, *world.captions(world.sample(50, generator=seeded()))):
        assert unknown_words(caption) == []
        words = tokenizer.convert_ids_to_tokens(tokenizer(caption)["input_ids"])
        assert words == [*vocabulary.words(caption), "</s>"]
    assert unknown_words("A red DOG, moving right; a dog") == ["dog", ";"]
    assert tokenizer("")["input_ids"] == [1] == world.empty_ids(1)[0, :1].tolist()
    assert tokenizer("a cat")["input_ids"][1] == tokenizer.unk_token_id


@pytest.mark.parametrize(("frames", "size"), [(1, 32), (5, 47), (3, 50)])
def test_drawing_is_deterministic_and_in_range_at_any_size(frames, size):
    spec = world.sample(3, generator=seeded(frames))
    clips = drawing.draw(spec, frames, size)
    assert clips.shape == (3, 3, frames, size, size)
    assert torch.equal(clips, drawing.draw(spec, frames, size))
    assert clips.isfinite().all() and clips.min() >= -1 and clips.max() <= 1


def test_a_window_shows_a_piece_of_the_frame():
    spec = world.sample(2, generator=seeded())
    times, centres, _ = drawing.grid(3, 64)
    whole, where = drawing.paint(spec, times, centres, centres)
    piece, _ = drawing.paint(spec, times, centres[16:48], centres[8:40])
    assert torch.allclose(whole[:, :, :, 16:48, 8:40], piece, atol=1e-5)
    assert where.min() >= 0 and where.max() == 1


def test_moving_backgrounds_move_and_differ_between_clips():
    spec = world.sample(2, generator=seeded())
    for name, moves in (("drifting", True), ("rippling", True), ("cloudy", True), ("speckled", False)):
        spec["back"].fill_(world.BACKGROUNDS.index(name))
        spec["cam"].fill_(0)
        corner = drawing.draw(spec, 5, 64)[:, 0, :, :8, :8]
        assert ((corner[:, 0] - corner[:, 1]).abs().mean() > 0.01) == moves, name
        assert (corner[0] - corner[1]).abs().mean() > 0.02, name

"""The text encoder's own stage: what captions tell, and that a short training reads it from the right words."""

import torch

from dit_sparse.pipelines.embedded import model, sampling, train_words, world


def spec_of(**values):
    names = ("colour", "shape", "motion", "size", "back", "cam", "two", "rel", "colour2", "shape2")
    spec = {name: torch.tensor([values.get(name, 0)]) for name in names}
    spec |= {name: torch.tensor([values.get(name, 1)]) for name in ("say_size", "say_motion", "say_back")}
    return spec | {"seed": torch.zeros(1, world.SEEDS)}


def test_places_of_a_pair_are_opposite():
    for index, name in enumerate(world.RELATIONS):
        place = train_words.answers(spec_of(two=1, rel=index))["place"][0].tolist()
        first, second = (torch.tensor(world.DIRECTIONS[p]) for p in place)
        assert place[0] == index and torch.equal(first, -second), name


def test_what_the_caption_leaves_out_is_not_asked_for():
    told = train_words.answers(spec_of(motion=3, size=2, back=5))
    assert (told["motion"][0, 0], told["size"][0, 0], told["back"][0, 0]) == (3, 2, 5)
    assert told["place"][0, 0] == len(world.RELATIONS)  # alone
    silent = train_words.answers(spec_of(motion=3, size=2, back=5, say_motion=0, say_size=0, say_back=0))
    assert silent["motion"][0, 0] == len(world.MOTIONS) and silent["size"][0, 0] == len(world.SIZES)
    assert silent["back"][0, 0] == len(world.BACKGROUNDS)
    pair = train_words.answers(spec_of(two=1, motion=3, size=2))  # a pair's caption tells neither
    assert pair["motion"][0, 0] == len(world.MOTIONS) and pair["size"][0, 0] == len(world.SIZES)


def test_answers_are_read_from_each_objects_own_words():
    # Features that hold the token itself: a readout can then know a word's own meaning and nothing else.
    torch.manual_seed(0)
    spec = world.sample(64, two=1.0)
    ids = world.TokenTables()(spec)
    readouts = train_words.Readouts(len(world.vocabulary()))
    with torch.no_grad():
        weight = readouts.heads["colour"].weight.zero_()
        readouts.heads["colour"].bias.zero_()
        weight[torch.arange(8), readouts.colours] = 1.0
        features = torch.nn.functional.one_hot(ids, len(world.vocabulary())).float()
        right = readouts.judge(features, ids, spec)["colour"][1].item()
    # The colour words (half of those asked) tell it; on the shape words all answers tie, and the first one wins.
    first = torch.stack([spec["colour"], spec["colour2"]]).eq(0).float().mean().item()
    assert abs(right - (0.5 + 0.5 * first)) < 1e-6


def test_a_short_training_tells_subject_from_object():
    torch.manual_seed(0)
    encoder, records = model.build_text_encoder(), []
    train_words.train(encoder, 120, records.append, batch=24, steps=160, rate=4e-3)
    held_out = records[-1]["held_out"]
    assert min(held_out[name] for name in ("motion", "size", "back", "cam")) > 0.95, held_out
    assert min(held_out[name] for name in ("colour", "shape", "place")) > 0.55, held_out  # guessing: .125, .125, .25


def test_the_empty_caption_has_features_of_its_own():
    encoder = model.build_text_encoder().eval()
    with torch.no_grad():
        features = sampling.embed(encoder, world.empty_ids(2))
    assert features[:, 0].abs().sum() > 0 and features[:, 1:].abs().sum() == 0

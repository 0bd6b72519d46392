"""What people write on the command line, and what is refused."""

from dataclasses import replace

import pytest

from ppal_backend.errors import SettingsError, StateError
from ppal_backend.simulation.plan import Plan, parse_amount, parse_seeds
from ppal_backend.simulation.variants import RIVAL_FAMILIES, Variant, check_detector, parse_variants
from ppal_backend.structures.round import RIVAL_NAMES
from tests.simulation.fakes import benchmark, make_plan


def test_a_list_of_names_and_options():
    variants = parse_variants("ppal, ppal:delta=2,alpha=0.1 ,random:match=ppal,entropy+ccms,ppal:xi=0.4,absent=drift")
    assert [v.name for v in variants] == [
        "ppal", "ppal:alpha=0.1,delta=2", "random:match=ppal", "entropy+ccms", "ppal:absent=drift,xi=0.4",
    ]  # fmt: skip
    assert variants[1].options == {"delta": 2, "alpha": 0.1} and variants[2].match == "ppal"
    assert variants[4].difficulty == {"xi": 0.4, "absent": "drift"} and not variants[4].options


def test_json_says_the_same():
    given = '["random", {"strategy": "ppal", "delta": 2, "xi": 0.4, "budget": 9}]'
    random, ppal = parse_variants(given)
    assert random == Variant("random")
    assert ppal == parse_variants("ppal:budget=9,delta=2,xi=0.4")[0]
    assert parse_variants('{"strategy": "dcus"}')[0].name == "dcus"
    assert parse_variants('[{"strategy": "ppal", "delta": 8.0}]')[0].name == "ppal:delta=8"


@pytest.mark.parametrize(
    "text",
    [
        "ppal:delta=2,alpha=0.1,budget=7",
        "random:match=ppal,ppal",
        "ppal:absent=drift",
        "ppal:levels=scale,start=typical",
    ],
)
def test_a_variant_survives_the_trip_to_disk(text):
    for variant in parse_variants(text):
        assert Variant.from_dict(variant.as_dict()) == variant


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("ppal,nonsense", "expected a strategy of random, entropy.*learnloss.*got 'nonsense'"),
        ("ppal:sigma=1", r"expected strategy options among .*\['sigma'\].*xi, momentum, absent, .*match, budget"),
        ("ppal:delta=0.5", "expected delta > 1"),
        ("ppal:xi=2", "expected xi to be a number in"),
        ("ppal:absent=sometimes", "expected absent to be one of"),
        ("ppal:levels=coarse", "expected levels one of .*'scale'"),
        ("ppal:start=warm", "expected start one of .*'typical'"),
        ("ppal:delta", "expected option=value"),
        ("ppal,ppal", "expected every strategy once, got ppal again"),
        ("random:match=entropy,ppal", "expected match to name another strategy of the list .ppal."),
        ("random:match=ppal,ppal:match=random", "expected match to name another"),
        ("", "expected at least one strategy"),
        ("[1", "broken text"),
        ('[{"delta": 2}]', "expected 'strategy' in"),
        ("ppal:budget=0", "expected budget >= 1"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(text, told):
    with pytest.raises(SettingsError, match=told):
        parse_variants(text)


def test_folders_of_variants_differ():
    names = ("ppal", "ppal:delta=2", "ppal:delta=3", "random:match=ppal", "dcus+rand")
    folders = [v.folder for v in parse_variants(",".join(names))]
    assert len(set(folders)) == len(names) and not any(set(":,/ ") & set(folder) for folder in folders)


@pytest.mark.parametrize(
    ("given", "images"), [("2.5%", 38), (38, 38), ("38", 38), ("5%", 75), ("0.001%", 1), ("100%", 1500), (7.0, 7)]
)
def test_amounts_in_images_or_shares(given, images):
    assert parse_amount(given, 1500, "budget") == images


@pytest.mark.parametrize("given", ["0", "-1", "101%", "0%", "many", "2.5", "nan%", "inf", ""])
def test_amounts_that_are_none_are_refused(given):
    with pytest.raises(SettingsError, match="expected budget as a number of images or a share"):
        parse_amount(given, 1500, "budget")


def test_seeds_as_count_or_list():
    assert parse_seeds(3) == parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("0,4,7") == (0, 4, 7) == parse_seeds([0, 4, 7])
    assert parse_seeds("4,") == (4,)
    with pytest.raises(SettingsError, match="number of seeds"):
        parse_seeds("three")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"start": 50}, "expected a pool of at least 68 images .a start of 50 and 3 rounds of 6., got 60"),
        ({"rounds": 0}, "at least 1 round"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (1, 1)}, "every seed once"),
        ({"delta": 1.0}, "delta > 1"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"threads": 0}, "threads"),
        ({"init_weights": "coco"}, "init_weights"),
        ({"slices": 63}, "slices: expected off, auto, or the side of a tile from 64 to 4096 px, got 63"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes, told):
    with pytest.raises(SettingsError, match=told):
        make_plan(benchmark(), **changes)


def test_two_strategies_never_share_a_folder():
    margin = {"strategy": "ppal", "match": "auto", "uncertainty": "margin"}
    of_margin = {"strategy": "ppal", "match": "auto:uncertainty=margin"}
    earlier = parse_variants(["auto", "auto:uncertainty=margin", margin])
    with pytest.raises(SettingsError, match=r"every strategy once, got ppal:match=auto,unc.*, ppal:match=auto:unc"):
        parse_variants([of_margin], earlier)


def test_a_plan_survives_the_trip_to_disk():
    plan = make_plan(benchmark(), "ppal:delta=2,ppal,random:match=ppal", max_iterations=5)
    assert Plan.from_dict(plan.as_dict()) == plan
    sliced = make_plan(benchmark(), slices="416")
    assert sliced.slices == 416 and Plan.from_dict(sliced.as_dict()) == sliced
    assert sliced.spec(0, 1, sliced.variants[0], "cpu", False).slices == 416
    earlier = {name: value for name, value in plan.as_dict().items() if name != "slices"}
    assert Plan.from_dict(earlier) == plan, "a folder of an earlier release cannot be gone on with"


def test_a_budget_of_its_own_must_fit_the_pool():
    with pytest.raises(SettingsError, match=r"at least 68 images \(a start of 8 and 3 rounds of 20\), got 60"):
        make_plan(benchmark(), "random,random:budget=20")
    assert make_plan(benchmark(), "random,ppal:budget=20,unit=boxes").budget == 6, "boxes are no images"


def test_seeds_strategies_and_rounds_of_a_simulation_may_grow_nothing_else():
    data = benchmark()
    earlier = make_plan(data, "random,ppal")
    variants = parse_variants("ppal,entropy", earlier.variants)
    assert [v.name for v in variants] == ["ppal", "entropy", "random"], "what was asked for now runs first"
    now = replace(earlier, variants=variants, seeds=(1, 2)).extends(earlier)
    assert now.variants == variants and now.seeds == (0, 1, 2)
    assert replace(earlier, rounds=5).extends(earlier).rounds == 5
    assert replace(earlier, rounds=1).extends(earlier).rounds == earlier.rounds, "what was run stays"
    for changes in ({"budget": 7}, {"max_iterations": 9}, {"data_sha256": "other"}, {"threads": 2}, {"slices": "auto"}):
        with pytest.raises(StateError, match=f"another simulation .*{next(iter(changes))}"):
            replace(earlier, **changes).extends(earlier)


def test_a_spec_carries_the_options_of_its_variant():
    plan = make_plan(benchmark(), "ppal:delta=2,alpha=0.5,xi=0.1,budget=4", delta=3.0)
    spec = plan.spec(1, 2, plan.variants[0], "cpu", True)
    assert (spec.delta, spec.budget, spec.seed, spec.number) == (2.0, 4, 1, 2)
    assert spec.strategy_options == {"alpha": 0.5} and spec.difficulty_options == {"xi": 0.1}
    assert spec.holdout_fraction == 0.0 and spec.look_at_labelled and spec.levels == "provenance"
    scaled = make_plan(benchmark(), "ppal:levels=scale")
    assert scaled.spec(0, 0, scaled.variants[0], "cpu", False).levels == "scale"
    plain = make_plan(benchmark(), "ppal", delta=3.0)
    assert plain.spec(0, 0, plain.variants[0], "cpu", False).delta == 3.0


def test_strategies_that_change_the_detector_train_first_models_of_their_own():
    ppal, learnloss, drifting = parse_variants("ppal,learnloss,learnloss:absent=drift")
    assert (ppal.first_model, learnloss.first_model) == ("default", "rival=learnloss")
    assert drifting.first_model == "absent=drift,rival=learnloss"
    assert learnloss.changes_detector and not ppal.changes_detector
    assert set(RIVAL_FAMILIES) == set(RIVAL_NAMES)


@pytest.mark.parametrize(("text", "family"), [("learnloss", "detr"), ("mdn", "anchor"), ("mial", "ssd")])
def test_strategies_that_cannot_change_a_detector_are_refused_before_anything_is_read(text, family):
    variants = parse_variants(f"ppal,{text}")
    for fine in RIVAL_FAMILIES[text]:
        check_detector(variants, "some", fine)
    check_detector(variants[:1], "some", family)
    with pytest.raises(SettingsError, match=f"strategy '{text}' changes detectors of .* got some .{family}."):
        check_detector(variants, "some", family)

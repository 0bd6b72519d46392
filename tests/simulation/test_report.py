"""The report: figures against hand counts, partial results, sweeps, and equal files for equal results."""

import csv
import itertools
import json
import shutil

import numpy as np
import pytest

from ppal_backend.errors import StateError
from ppal_backend.files import read_json, write_json
from ppal_backend.rounds.detections_store import DetectionsWriter
from ppal_backend.simulation.data import Benchmark
from ppal_backend.simulation.folder import Results, round_place
from ppal_backend.simulation.report import write_detectors, write_report
from ppal_backend.simulation.schedule import run_tasks
from ppal_backend.simulation.statistics import compare_retrieval, permutation_test
from ppal_backend.simulation.variants import parse_variants
from tests.simulation.fakes import FakeEngine, benchmark, dataset, detections_of, features_of, lay_out, make_plan

STRATEGIES = "random,random:match=ppal,entropy,ppal,ppal:delta=2,ppal:delta=3,ppal:uncertainty=margin"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tmp_path_factory.mktemp("finished")
    data = benchmark()
    plan = make_plan(data, STRATEGIES)
    lay_out(root, data, plan)
    run_tasks(root, plan, lambda _: FakeEngine())
    write_report(root)
    return root, plan


def results_of(root, name, seed, rounds):
    return [round_place(root, seed, name, k).result() for k in range(rounds + 1)]


def gaps(root, plan, mine, theirs):
    """Differences in mAP of every seed and round, without those of equal models."""
    pairs = [
        zip(results_of(root, mine, seed, plan.rounds), results_of(root, theirs, seed, plan.rounds), strict=True)
        for seed in plan.seeds
    ]
    differences = [a["map"] - b["map"] for pair in pairs for a, b in pair]
    return [d for d in differences if d != 0]


def test_summary_holds_what_is_promised(finished):
    root, plan = finished
    summary = read_json(root / "report" / "summary.json")
    assert summary["complete"] and (summary["subject"], summary["baseline"]) == ("ppal", "random")
    assert set(summary["aulc"]) == {v.name for v in plan.variants}
    by_seed = []
    for seed in plan.seeds:
        found = results_of(root, "ppal", seed, plan.rounds)
        heights = [r["map"] for r in found]  # evenly spaced, so the trapezoid rule is plain
        by_seed.append((heights[0] / 2 + sum(heights[1:-1]) + heights[-1] / 2) / plan.rounds)
    assert summary["aulc"]["ppal"] == pytest.approx(np.mean(by_seed))
    assert summary["strategies"]["ppal"]["aulc"]["std"] == pytest.approx(np.std(by_seed, ddof=1))
    assert summary["p_value"] == pytest.approx(permutation_test(gaps(root, plan, "ppal", "random")))
    assert 0 < summary["label_saving"] < 1, "PPAL finds the images with more boxes, from which the fake learns"
    ppal = summary["strategies"]["ppal"]
    last = [f"{100 * ppal[what]:.0f} %" for what in ("label_saving", "box_saving")]
    text = (root / "report" / "report.md").read_text()
    table = text.split("## Saved until the mAP of each of `random`'s queries: images / boxes\n\n")[1].split("\n\n")[0]
    row = next(line for line in table.splitlines() if line.startswith("| ppal |"))
    assert len(row.split("|")) == plan.rounds + 3 and row.endswith(f"| {last[0]} / {last[1]} |")


def test_what_was_left_out_of_the_data_stands_in_the_report(finished, tmp_path):
    root, _ = finished
    facts = read_json(root / "data" / "facts.json")
    del facts["notes"]  # a simulation from before they were kept
    for name in ("simulation.json", "seed-0", "seed-1"):
        (tmp_path / name).symlink_to(root / name)
    for notes in ({}, {"notes": ["the pool has no box of 1 class that the test set has: eel"]}):
        write_json(tmp_path / "data" / "facts.json", {**facts, **notes})
        text = write_report(tmp_path, tmp_path / "report", plots=False).read_text()
        assert ("\n- the pool has no box of 1 class that the test set has: eel\n" in text) == bool(notes)
    assert read_json(tmp_path / "report" / "summary.json")["data"]["notes"] == notes["notes"]


def height(curve, at):
    """mAP of a curve of (labels, mAP) at a number of labels, None beyond its ends."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= at <= right and left < right:
            return low + (high - low) * (at - left) / (right - left)
    return None


def slow_curve(root, plan, name, seed, count):
    """(labels, mAP) of every round, the labels summed up by hand: images, boxes or seconds of work."""
    found, total = results_of(root, plan.variant(name).folder, seed, plan.rounds), 0.0
    curve = []
    for k, r in enumerate(found):
        if count == "seconds":
            work = found[k - 1]["work"] if k else {"image": r["labelled_images"], "drawn": r["labelled_boxes"]}
            each = {"image": 5, "drawn": 7, "moved": 3.5, "kept": 1.6, "deleted": 1.6}
            total += sum(times * each[what] for what, times in work.items())
        curve.append((total if count == "seconds" else r[count], r["map"]))
    return curve


@pytest.mark.parametrize(
    "name",
    [
        "ppal",
        "random:match=ppal",
        "random:budget=9",
        "entropy:budget=12,unit=boxes",
        "random:match=random:budget=2,unit=boxes",
    ],
)
def test_savings_and_gaps_are_those_of_a_slow_reference(uneven, name):
    root, plan = uneven
    found = read_json(root / "report" / "summary.json")["strategies"][name]
    keys = {"labelled_images": "label_saving", "labelled_boxes": "box_saving", "seconds": "time_saving"}
    for count, saving in keys.items():
        curves = {n: [slow_curve(root, plan, n, s, count) for s in plan.seeds] for n in (name, "random")}
        mine, theirs = ([tuple(np.mean(points, axis=0)) for points in zip(*curves[n], strict=True)] for n in curves)
        by_round = []
        for _, level in theirs:
            reached, needed = (
                next((at for at in grid if (height(curve, at) or 0) >= level - 1e-12), None)
                for curve, grid in ((c, np.linspace(c[0][0], c[-1][0], 20_001)) for c in (mine, theirs))
            )
            by_round.append(None if reached is None else pytest.approx(1 - reached / needed, abs=1e-3))
        assert found[f"{saving}_by_round"] == by_round, saving
        assert found[saving] == by_round[-1], saving
    for count, gap in (("labelled_images", "aulc_gap"), ("labelled_boxes", "aulc_gap_by_boxes")):
        each = []
        for seed in plan.seeds:
            a, b = (slow_curve(root, plan, n, seed, count) for n in (name, "random"))
            grid = np.linspace(a[0][0], min(a[-1][0], b[-1][0]), 20_001)
            each.append(np.mean([height(a, at) - height(b, at) for at in grid]))
        assert found[gap]["per_seed"] == pytest.approx(each, abs=1e-4), gap
    pairs = []  # at the baseline's numbers of images
    for seed in plan.seeds:
        a, b = (slow_curve(root, plan, n, seed, "labelled_images") for n in (name, "random"))
        pairs += [height(a, at) - value for at, value in b[1:] if height(a, at) is not None]
    assert found["p_value"] == pytest.approx(permutation_test(pairs))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Strategies that label other numbers of images, boxes or neither in a round."""
    root, data = tmp_path_factory.mktemp("uneven"), benchmark()
    named = "random,ppal,random:match=ppal,random:budget=9,entropy:budget=12,unit=boxes,random:budget=2,unit=boxes"
    follower = {"strategy": "random", "match": "random:budget=2,unit=boxes"}
    plan = make_plan(data, [*(v.as_dict() for v in parse_variants(named)), follower], retrieval_images=0)
    lay_out(root, data, plan)
    run_tasks(root, plan, lambda _: FakeEngine())
    write_report(root, plots=False)
    rounds = [r for seed in plan.seeds for r in results_of(root, plan.variants[-1].folder, seed, plan.rounds)[:-1]]
    assert [] in [r["picks"] for r in rounds], "rounds that label nothing are among them"
    return root, plan


def test_box_matched_random_is_compared_round_by_round(finished):
    root, plan = finished
    matched = read_json(root / "report" / "summary.json")["box_matched"]["ppal"]
    assert matched["against"] == "random:match=ppal" and len(matched["map_gap"]) == 3
    folder = plan.variant("random:match=ppal").folder
    gaps = [
        round_place(root, seed, "ppal", k).result()["map"] - round_place(root, seed, folder, k).result()["map"]
        for seed in plan.seeds
        for k in range(1, plan.rounds + 1)
    ]
    assert matched["mean_gap"] == pytest.approx(np.mean(gaps)), "round 0 is shared and does not count"
    assert abs(matched["mean_gap"]) < 0.02, "the fake learns from boxes alone, so equal boxes mean equal mAP"


def test_random_is_the_one_told_of_several_that_follow_a_strategy_and_how_near_it_came_is_told(tmp_path):
    root, data = tmp_path, benchmark()
    plan = make_plan(data, "ppal,entropy:match=ppal,random:match=ppal,dcus:match=ppal,random", retrieval_images=0)
    lay_out(root, data, plan)
    run_tasks(root, plan, lambda _: FakeEngine())
    text = write_report(root, plots=False).read_text()
    matched = read_json(root / "report" / "summary.json")["box_matched"]["ppal"]
    assert matched["against"] == "random:match=ppal"
    boxes = np.array([[[r["labelled_boxes"] for r in results_of(root, plan.variant(n).folder, s, plan.rounds)[1:]]
                       for s in plan.seeds] for n in ("random:match=ppal", "ppal")], float)  # fmt: skip
    assert matched["boxes_off"] == pytest.approx(np.abs(boxes[0] / boxes[1] - 1).max())
    assert f"as many labelled boxes in every round (to within {100 * matched['boxes_off']:.0f} %)" in text


def test_the_best_strategy_is_not_one_that_was_given_more_labels(tmp_path):
    data = benchmark()
    plan = make_plan(data, "random,entropy,random:budget=16", retrieval_images=0)
    lay_out(tmp_path, data, plan)
    run_tasks(tmp_path, plan, lambda _: FakeEngine())
    text = write_report(tmp_path, plots=False).read_text()
    summary = read_json(tmp_path / "report" / "summary.json")
    assert summary["aulc"]["random:budget=16"] > summary["aulc"]["entropy"], "over a longer range"
    assert summary["subject"] == "entropy"
    assert "Other numbers of images than the columns say: random:budget=16" in text


def test_first_models_and_images_are_told_as_they_were(tmp_path, finished):
    shared = "In a seed every strategy begins with the same images and the same first model."
    data = benchmark()
    plan = make_plan(data, "random,ppal,ppal:start=typical,ppal:xi=0.2", rounds=1, retrieval_images=0)
    lay_out(tmp_path, data, plan)
    run_tasks(tmp_path, plan, lambda _: FakeEngine())
    text = write_report(tmp_path, plots=False).read_text()
    assert shared not in text and shared in (finished[0] / "report" / "report.md").read_text()
    assert "In a seed every random start, and every typical one, begins with the same images and a first model" in text
    assert "that is shared by: random, ppal | ppal:start=typical | ppal:xi=0.2." in text


def test_curves_without_a_common_range_of_boxes_have_no_gap(tmp_path):
    data = benchmark()
    plan = make_plan(data, "random,ppal:start=typical", rounds=1, retrieval_images=0)
    lay_out(tmp_path, data, plan)
    run_tasks(tmp_path, plan, lambda _: FakeEngine())
    for number in (0, 1):
        place = round_place(tmp_path, 1, plan.variants[1].folder, number)
        place.write_result({**place.result(), "labelled_boxes": 1000 + number})
    write_report(tmp_path, plots=False)
    by_boxes = read_json(tmp_path / "report" / "summary.json")["strategies"]["ppal:start=typical"]["aulc_gap_by_boxes"]
    assert by_boxes["per_seed"][1] is None and by_boxes["mean"] == by_boxes["per_seed"][0]


def test_seconds_of_looking_and_choosing_are_those_of_rounds_that_did(finished, tmp_path):
    root, plan = tmp_path / "copy", finished[1]
    shutil.copytree(finished[0], root)
    for number in range(plan.rounds + 1):
        place = round_place(root, 0, "ppal", number)
        chose = number < plan.rounds
        place.write_result({**place.result(), "seconds": {"train": 10.0 * number, "infer": 4.0 if chose else 0.1}})
        round_place(root, 1, "ppal", number).path.joinpath("result.json").unlink()
    text = write_report(root, plots=False).read_text().split("## Seconds per step")[1]
    header, _, *rows = [line.strip("| ").split(" | ") for line in text.split("##")[0].strip().splitlines()]
    shown = dict(zip(header, next(row for row in rows if row[0] == "ppal"), strict=True))
    assert (shown["train"], shown["infer"]) == ("20.0", "4.0"), "the last round looks at no pool"


def test_tail_and_head_are_thirds_by_frequency(finished):
    root, plan = finished
    results = Results.read(root)
    counts = dict(zip(results.facts["labels"], results.facts["class_counts"], strict=True))
    groups = results.class_groups()
    assert groups["tail"] == ("wolf",) == (min(counts, key=counts.get),)
    assert groups["head"] == ("cat",) and counts["cat"] == max(counts.values())
    summary = read_json(root / "report" / "summary.json")
    mean = np.mean([results_of(root, "ppal", s, plan.rounds)[2]["per_class"]["wolf"] for s in plan.seeds])
    assert summary["strategies"]["ppal"]["tail_ap"][2]["mean"] == pytest.approx(mean)


def test_near_duplicates_are_counted_by_scene(finished):
    root, plan = finished
    for name in ("random", "entropy"):
        tables = Results.read(root).near_duplicates(name)
        for row, seed in enumerate(plan.seeds):
            known = {(i - 1) // 3 for i in round_place(root, seed, name, 1).labelled()}
            picks = [(i - 1) // 3 for i in round_place(root, seed, name, 1).result()["picks"]]
            assert tables["inside"][row, 1] == len(picks) - len(set(picks))
            assert tables["labelled"][row, 1] == sum(p in known for p in picks)


def test_difficulty_is_correlated_with_ap(finished):
    root, _ = finished
    summary = read_json(root / "report" / "summary.json")
    assert [pair["mean"] for pair in summary["strategies"]["ppal"]["difficulty_spearman"]] == [-1.0] * 4


def test_csv_has_a_line_a_round(finished):
    root, plan = finished
    with (root / "report" / "rounds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(plan.variants) * len(plan.seeds) * (plan.rounds + 1)
    row = next(r for r in rows if (r["strategy"], r["seed"], r["round"]) == ("ppal", "1", "2"))
    found = round_place(root, 1, "ppal", 2).result()
    assert float(row["map"]) == found["map"] and int(row["labelled_boxes"]) == found["labelled_boxes"]


def test_the_markdown_tells_everything_and_its_plots_exist(finished):
    root, _ = finished
    text = (root / "report" / "report.md").read_text()
    for title in ("Comparison", "AP50", "tail", "head", "Labelled boxes", "Near-duplicates", "Seconds per step",
                  "Table 1", "Tables 2 and 3", "Table 4", "Retrieval", "Rank correlation"):  # fmt: skip
        assert title in text, title
    shown = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"map.svg", "map-by-boxes.svg", "difficulty.svg", "retrieval.svg", "sweep-delta.svg"} <= set(shown)
    for name in shown:
        assert (root / "report" / name).stat().st_size > 1000
    svg = (root / "report" / "map.svg").read_text()
    assert "random:match=ppal" in svg and "labelled images" in svg


def test_sweeps_group_by_what_else_is_equal(finished):
    root, _ = finished
    text = (root / "report" / "report.md").read_text()
    section = text.split("## delta")[1].split("##")[0]
    assert [line.split("|")[2].strip() for line in section.splitlines() if line.startswith("| ppal ")] == [
        "2", "3", "4.0",
    ]  # fmt: skip
    margins = text.split("## uncertainty")[1].split("##")[0]
    assert "margin" in margins and "entropy" in margins


def test_a_partial_simulation_is_reported_as_such(finished, tmp_path):
    root, plan = finished
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy" / "seed-1" / "ppal" / "round-02" / "result.json").unlink()
    (tmp_path / "copy" / "seed-0" / "entropy" / "round-00" / "result.json").unlink()
    (tmp_path / "copy" / "seed-1" / "entropy" / "round-00" / "result.json").unlink()
    report = write_report(tmp_path / "copy", tmp_path / "out", plots=False)
    total = len(plan.variants) * 2 * 4
    assert f"Unfinished: {total - 2 - 8} of {total} rounds." in report.read_text()
    summary = read_json(tmp_path / "out" / "summary.json")
    assert not summary["complete"] and summary["strategies"]["ppal"]["compared_seeds"] == [0]
    assert "entropy" not in summary["aulc"]


def test_one_round_of_one_strategy_is_enough_for_a_report(tmp_path):
    data = benchmark()
    plan = make_plan(data, "ppal", seeds=(0,), retrieval_images=0)
    lay_out(tmp_path, data, plan)
    with pytest.raises(StateError, match="at least one finished round"):
        write_report(tmp_path)
    run_tasks(tmp_path, plan, lambda _: FakeEngine())
    for number in (1, 2, 3):
        (tmp_path / "seed-0" / "ppal" / f"round-0{number}" / "result.json").unlink()
    write_report(tmp_path, plots=False)
    summary = read_json(tmp_path / "report" / "summary.json")
    assert summary["baseline"] == "ppal" and summary["subject"] is None and summary["p_value"] is None


def test_without_random_and_ppal_there_is_nothing_to_compare_with(tmp_path):
    data = benchmark()
    plan = make_plan(data, "entropy", seeds=(0,), retrieval_images=0)
    lay_out(tmp_path, data, plan)
    run_tasks(tmp_path, plan, lambda _: FakeEngine())
    assert "Neither `random` nor `ppal` was run" in write_report(tmp_path, plots=False).read_text()


def test_without_groups_and_difficulty_the_report_leaves_them_out(tmp_path):
    data = Benchmark(dataset(40), dataset(10, 1001))
    plan = make_plan(data, "random,ppal", seeds=(0,), rounds=1)
    lay_out(tmp_path, data, plan)
    run_tasks(tmp_path, plan, lambda _: FakeEngine())
    for name in ("random", "ppal"):
        for number in (0, 1):
            place = round_place(tmp_path, 0, name, number)
            place.write_result({**place.result(), "difficulty": None})
    text = write_report(tmp_path).read_text()
    assert "Near-duplicates" not in text and "Rank correlation" not in text and "difficulty.svg" not in text


def test_without_random_others_are_compared_with_ppal(tmp_path):
    data = benchmark()
    plan = make_plan(data, "ppal,entropy")
    lay_out(tmp_path, data, plan)
    run_tasks(tmp_path, plan, lambda _: FakeEngine())
    text = write_report(tmp_path).read_text()
    summary = read_json(tmp_path / "report" / "summary.json")
    assert (summary["subject"], summary["baseline"]) == ("entropy", "ppal")
    assert summary["p_value"] == pytest.approx(permutation_test(gaps(tmp_path, plan, "entropy", "ppal")))
    assert "**entropy against ppal:**" in text and "paired by seed against `ppal`" in text


def test_a_folder_without_simulation_is_refused(tmp_path):
    with pytest.raises(StateError, match="expected the folder of a simulation"):
        write_report(tmp_path)


def test_the_same_results_give_the_same_files(finished, tmp_path):
    root, _ = finished
    write_report(root, tmp_path)
    for name in ("report.md", "summary.json", "rounds.csv", "map.svg", "difficulty.svg", "retrieval.svg"):
        assert (tmp_path / name).read_bytes() == (root / "report" / name).read_bytes(), name
    json.loads((tmp_path / "summary.json").read_text())


def test_retrieval_prefers_the_similarity_that_knows_classes(tmp_path):
    data = Benchmark(dataset(60), dataset(10, 1001))
    writer = DetectionsWriter(tmp_path)
    for image_id in data.pool.image_ids:
        writer.add(detections_of(image_id, 1, 3), features_of(image_id))
    writer.flush()
    found = compare_retrieval(tmp_path, data, 40)
    assert found["images"] == 40 and found["top"] == 20
    assert found["ccms"]["jaccard"] > found["chance"] + 0.1 > found["global"]["jaccard"]
    assert compare_retrieval(tmp_path, data, 40) == found
    grouped = Benchmark(data.pool, data.test, {i: (i - 1) // 3 for i in data.pool.image_ids})
    assert compare_retrieval(tmp_path, grouped, 60)["images"] == 20, "one of each three near-duplicates"
    assert compare_retrieval(tmp_path, data, 2) is None


def test_jaccard_of_true_classes_by_hand(tmp_path):
    from ppal_backend.simulation.statistics import _jaccard

    table = _jaccard([frozenset({1, 2}), frozenset({2, 3}), frozenset({1, 2}), frozenset({4})])
    assert table[0].tolist() == pytest.approx([1.0, 1 / 3, 1.0, 0.0])


def test_detectors_of_several_simulations_stand_in_one_table(finished, tmp_path):
    root, plan = finished
    other = tmp_path / "other"
    shutil.copytree(root, other)
    changed = {**plan.as_dict(), "detector": "fcos_tiny", "title": "the other"}
    (other / "simulation.json").write_text(json.dumps(changed))
    text = write_detectors([root, other], tmp_path / "out").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[:2] for row in rows[2:]] == [
        [f"| {detector}", name] for detector in (plan.detector, "fcos_tiny") for name in ("random", "ppal")
    ]
    last = np.mean([results_of(root, "ppal", seed, plan.rounds)[-1]["map"] for seed in plan.seeds])
    assert rows[-1][-1].startswith(f"{100 * last:.1f} ±") and len(rows[-1]) == 2 + plan.rounds


def test_simulations_of_different_shares_are_lined_up_by_query(finished, tmp_path):
    root, plan = finished
    other = tmp_path / "other"
    shutil.copytree(root, other)
    (other / "simulation.json").write_text(json.dumps({**plan.as_dict(), "pool_images": plan.pool_images * 2}))
    text = write_detectors([root, other], tmp_path / "out").read_text()
    assert "| query 1 |" in text and "%" not in text.split("\n")[4]


def test_detectors_need_random_or_ppal(finished, tmp_path):
    root, plan = finished
    other = tmp_path / "other"
    shutil.copytree(root, other)
    kept = [v.as_dict() for v in plan.variants if v.name == "entropy"]
    (other / "simulation.json").write_text(json.dumps({**plan.as_dict(), "variants": kept}))
    with pytest.raises(StateError, match="random or ppal"):
        write_detectors([other], tmp_path / "out")

from ppal_backend.rounds.split import holdout_ids


def test_an_image_stays_on_its_side_as_the_set_grows():
    small, large = holdout_ids(range(200), 0.1), holdout_ids(range(5000), 0.1)
    assert small == {i for i in large if i < 200}


def test_about_the_asked_share_is_held_out():
    assert 0.08 < len(holdout_ids(range(5000), 0.1)) / 5000 < 0.12


def test_small_sets_hold_out_one_and_tiny_ones_none():
    assert holdout_ids(range(9), 0.1) == set()
    assert all(len(holdout_ids(range(start, start + 10), 1e-9)) == 1 for start in range(50))


def test_never_more_than_half_and_nothing_at_zero():
    assert len(holdout_ids(range(100), 0.999)) == 50
    assert holdout_ids(range(100), 0.0) == set()

"""Classes of a model and of data meet by their names, never by their numbers."""

from __future__ import annotations

import pytest

from stepwell.evaluate.class_names import match_classes


def test_labels_follow_the_names():
    match = match_classes(["cat", "dog", "fox"], ["fox", "cat"])
    assert match.places == (1, 2, 0)
    assert (match.names, match.others) == (("fox", "cat"), ("dog",))


def test_a_class_that_the_model_does_not_know_is_refused():
    with pytest.raises(
        ValueError, match="does not know 'cow' of the data; it knows 'LABEL_0', 'LABEL_1'"
    ) as told:
        match_classes(["LABEL_0", "LABEL_1"], ["cow"])
    assert "\n" not in str(told.value)
    many = [f"c{i}" for i in range(9)]
    with pytest.raises(ValueError, match="it knows 'c0', 'c1', 'c2', 'c3', 'c4' and 4 more"):
        match_classes(many, ["cow"])


@pytest.mark.parametrize(
    ("of_model", "of_data", "who"),
    [(["a", "a"], ["a"], "the model"), (["a", "b"], ["a", "a"], "the data")],
)
def test_a_name_that_stands_twice_is_refused(of_model, of_data, who):
    with pytest.raises(ValueError, match=f"{who} names the class 'a' twice"):
        match_classes(of_model, of_data)


def test_classes_of_which_the_data_have_nothing_may_be_any():
    match = match_classes(["cat", "dog"], ["animals", "dog", "cat", "dog"], used={2, 3})
    assert match.places == (2, 3)
    assert (match.names, match.unknown) == (("animals", "dog", "cat", "dog"), ("animals",))
    assert match_classes(["cat", "dog"], ["dog", "cat"], used={1}).places == (1, 0)
    with pytest.raises(ValueError, match="does not know 'animals'"):
        match_classes(["cat", "dog"], ["animals", "dog"], used={0})
    with pytest.raises(ValueError, match="the data names the class 'dog' twice"):
        match_classes(["cat", "dog"], ["dog", "dog"], used={0, 1})


def test_doubles_that_the_data_lack_do_no_harm():
    assert match_classes(["crane", "crane", "fox"], ["fox"]).others == ("crane", "crane")

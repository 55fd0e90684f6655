"""The switch between the reference and the fast path."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stepwell.ops import products
from stepwell.ops.choose import Path, choose, prefer, preferred


@pytest.mark.parametrize(
    ("path", "fast_ok", "taken"),
    [
        ("auto", True, True),
        ("auto", False, False),
        ("reference", True, False),
        ("reference", False, False),
        ("fast", True, True),
    ],
)
def test_which_path_is_taken(path: Path, fast_ok: bool, taken: bool) -> None:
    with prefer(path):
        assert choose(fast_ok=fast_ok, why_not="") is taken


def test_without_a_wish_the_fast_path_is_taken_where_there_is_one() -> None:
    assert choose(fast_ok=True, why_not="")
    assert not choose(fast_ok=False, why_not="")


def test_a_fast_path_that_there_is_not_is_an_error_with_its_reason() -> None:
    with prefer("fast"), pytest.raises(RuntimeError, match="requested but the window is odd"):
        choose(fast_ok=False, why_not="the window is odd")


def test_a_wish_ends_with_its_block_even_after_an_error() -> None:
    with prefer("reference"):
        with pytest.raises(KeyError), prefer("fast"):
            raise KeyError
        assert not choose(fast_ok=True, why_not="")
    assert choose(fast_ok=True, why_not="")


def test_an_unknown_path_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown path 'quick'"), prefer("quick"):  # type: ignore[arg-type]
        pass


@pytest.mark.parametrize("path", ["reference", "fast"])
def test_a_wish_is_read_and_not_recognised(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from a command line, where equal texts are not one object."""
    wish = "".join(list(path))
    assert wish is not path
    monkeypatch.setattr(products, "has_slow_products", lambda: True)
    large = torch.empty(256, 1024), torch.empty(1024, 1024)
    with prefer(wish):  # type: ignore[arg-type]
        assert preferred() == path
        assert choose() is (path == "fast")
        assert products._is_faster(*large, None) is (path == "fast")
        if path == "fast":
            with pytest.raises(RuntimeError, match="requested"):
                choose(fast_ok=False)


def test_a_wish_of_one_thread_is_not_heard_by_another() -> None:
    with ThreadPoolExecutor(max_workers=1) as other:
        assert other.submit(choose).result()
        with prefer("reference"):
            assert not choose()
            assert other.submit(choose).result()  # neither by one that runs already
            with ThreadPoolExecutor(max_workers=1) as third:
                assert third.submit(choose).result()  # nor by one that starts now
        wish = prefer("reference")
        other.submit(wish.__enter__).result()
        assert choose()
        assert not other.submit(choose).result()


def test_a_compiled_graph_follows_the_wish_of_the_thread_that_calls_it() -> None:
    compiled = torch.compile(lambda x: x + 1 if choose() else x * 3, fullgraph=True, backend="eager")
    x = torch.ones(1)
    assert compiled(x) == 2
    with prefer("reference"), ThreadPoolExecutor(max_workers=1) as other:
        assert compiled(x) == 3
        assert other.submit(compiled, x).result() == 2
    assert compiled(x) == 2

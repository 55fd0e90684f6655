"""The vision probes of benchmarks/, in the parts that can be wrong: what is counted, what heads learn from,
what up-samplers are asked, the colours of maps.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from stepwell.encoders.catalogue import build_encoder
from stepwell.models.upsampler import StepwellUpsampler, StepwellUpsamplerConfig
from stepwell.train.multiview import HiddenMap

ROOT = Path(__file__).parents[1]
NANO = {"encoder": "vit_nano", "arguments": {"dim": 32, "depth": 3, "num_heads": 2, "patch": 8}}


@pytest.fixture(scope="module")
def scripts():
    """The benchmarks by name: they import each other as scripts of one folder do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        import frozen_maps
        import probe_data
        import pyramid_pictures
        import vision_probes

        yield SimpleNamespace(
            maps=frozen_maps, data=probe_data, pictures=pyramid_pictures, probes=vision_probes
        )


@pytest.fixture
def upsampler():
    torch.manual_seed(3)
    config = StepwellUpsamplerConfig(**NANO, select_layer=-2, dim=32, levels=2)
    return StepwellUpsampler(config).eval().requires_grad_(False)


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return HiddenMap(build_encoder("vit_nano", **NANO["arguments"]), 2).eval().requires_grad_(False)


def picture(seed: int, size: tuple[int, int] = (40, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("best", "text"),
    [
        ([0, 1, 1, 0, 1, 2, 2], "aab"),  # a blank parts two of a kind
        ([1, 1, 1], "a"),
        ([0, 0], ""),
        ([2, 1, 0, 0, 2, 2], "bab"),
    ],
)
def test_repeats_are_joined_before_blanks_go(scripts, best, text) -> None:
    assert scripts.probes.decode(F.one_hot(torch.tensor(best), 3).float(), "ab") == text


def test_ctc_gives_the_most_to_what_is_decoded(scripts) -> None:
    """torch's loss of the decoded text is smaller than of all other texts, where every column is certain."""
    best = torch.tensor([1, 0, 1, 2, 2, 0])
    scores = (8 * F.one_hot(best, 3).double()).log_softmax(-1)
    text = scripts.probes.decode(scores, "ab")
    losses = {
        other: F.ctc_loss(
            scores[:, None],
            torch.tensor([["ab".index(c) + 1 for c in other]]),
            torch.tensor([6]),
            torch.tensor([len(other)]),
        )
        for other in ("a", "ab", "aab", "abb", "aabb", "ba")
    }
    assert text == min(losses, key=lambda other: losses[other] * len(other)) == "aab"


def test_words_are_counted_by_receipt(scripts) -> None:
    receipts = torch.tensor([4, 4, 9, 4])
    counts = scripts.probes.reading_counts(["AB", "X", "CD", "ABCE"], ["AB", "", "CD", "ABCD"], receipts)
    assert counts.tolist() == [[3, 1, 1 + 0 + 0.75], [1, 1, 1]]
    words, characters = (metric.of(counts.sum(0)) for metric in scripts.probes.PROBES["ocr"].metrics)
    assert words == pytest.approx(50)
    assert characters == pytest.approx(100 * 2.75 / 4)


def test_words_are_lines_without_a_blank(scripts) -> None:
    box = (10.0, 20.0, 60.0, 30.0)
    accepted = [text for text in ("12.30", "A B", "A", "A" * 14, "A" * 15) if scripts.data.is_word(text, box)]
    assert accepted == ["12.30", "A" * 14]
    assert not scripts.data.is_word("12.30", (10.0, 20.0, 61.0, 30.0))


def test_a_word_keeps_its_shape_unless_it_is_too_wide(scripts) -> None:
    black = Image.new("RGB", (20, 10))
    image, width = scripts.data.on_white(black)
    padded = np.array(image)
    assert width == 112
    assert padded.shape == (56, 224, 3)
    assert (padded[:, :112] == 0).all()
    assert (padded[:, 112:] == 255).all()
    image, width = scripts.data.on_white(Image.new("RGB", (90, 10)))
    assert width == 224
    assert (np.array(image) == 0).all()


def test_scores_of_segmentation_by_hand(scripts) -> None:
    labels = torch.tensor([[0, 0, 1], [1, 1, 255]])
    answers = torch.tensor([[0, 1, 1], [1, 1, 0]])
    counts = scripts.probes.confusions(answers, labels, 3)
    assert counts.view(3, 3).tolist() == [[1, 1, 0], [0, 3, 0], [0, 0, 0]]
    assert scripts.probes.pixel_accuracy(counts) == pytest.approx(80)
    # class 2 is nowhere, and no part of the mean
    assert scripts.probes.mean_iou(counts) == pytest.approx(100 * (1 / 2 + 3 / 4) / 2)


def test_confusions_are_a_histogram_of_pairs(scripts) -> None:
    generator = torch.Generator().manual_seed(0)
    labels, answers = (torch.randint(0, 4, (50, 50), generator=generator) for _ in range(2))
    pairs = np.histogram2d(labels.flatten(), answers.flatten(), bins=range(5))[0]
    assert (scripts.probes.confusions(answers, labels, 4).view(4, 4).numpy() == pairs).all()


def test_a_guided_map_is_the_level_of_its_size(scripts, upsampler) -> None:
    map, image = torch.randn(2, 32, 5, 6), torch.randn(2, 3, 40, 48)
    way = scripts.maps.guided(upsampler)
    assert torch.equal(way(map, image, 4), upsampler(map, image))
    assert torch.equal(
        way(map, image, 2), upsampler.pyramid.stages[0](map, F.adaptive_avg_pool2d(image, (10, 12)))
    )
    assert not torch.allclose(way(map, image, 4), way(map, image.flip(-1), 4))


def test_ways_without_guidance_are_interpolations(scripts) -> None:
    map, image = torch.randn(2, 32, 5, 6), torch.zeros(2, 3, 40, 48)
    assert torch.equal(scripts.maps.plain(map, image, 2), map.repeat_interleave(2, 2).repeat_interleave(2, 3))
    ramp = torch.arange(4.0).expand(1, 1, 2, 4)
    expected = np.interp(np.arange(8) / 2 - 0.25, np.arange(4), np.arange(4))
    assert np.allclose(scripts.maps.bilinear(ramp, image, 2)[0, 0, 0], expected)


def test_batches_hold_what_a_way_makes_of_each_image(scripts, encoder, upsampler) -> None:
    """More images than a batch: each map is enlarged under its own image, then standardised."""
    samples = scripts.maps.extract(encoder, (picture(i) for i in range(18)), (40, 48))
    assert samples.images.shape == (18, 3, 40, 48)
    assert torch.allclose(samples.maps[17].float(), encoder(samples.images[17:].float())[0], atol=2e-3)
    moments = scripts.maps.statistics(samples.maps)
    way = scripts.maps.guided(upsampler)
    maps = torch.cat(list(scripts.maps.enlarged(samples, way, 4, moments)))
    alone = way(samples.maps[17:].float(), samples.images[17:].float(), 4)[0]
    assert torch.allclose(maps[17].float(), (alone - moments[0]) / moments[1], atol=2e-2)
    plain = torch.cat(list(scripts.maps.enlarged(samples, scripts.maps.plain, 1, moments))).float()
    assert torch.allclose(plain.mean((0, 2, 3)), torch.zeros(32), atol=1e-2)
    assert torch.allclose(plain.transpose(0, 1).flatten(1).std(1), torch.ones(32), atol=1e-2)


def test_heads_of_several_seeds_learn_as_if_they_were_alone(scripts, monkeypatch) -> None:
    maps, labels = torch.randn(12, 4, 3, 3), torch.arange(12) % 3

    def trained(seeds: int) -> nn.ModuleList:
        monkeypatch.setattr(scripts.probes, "SEEDS", seeds)
        heads = scripts.probes.seeded(lambda: scripts.probes.Classifier(4, 3))
        before = [head.scores.weight.clone() for head in heads]
        scripts.probes.fit(
            heads,
            maps,
            lambda scores, places: F.cross_entropy(scores, labels[places]),
            optimiser=torch.optim.Adam(heads.parameters(), 1e-2),
            steps=7,
            batch=5,
        )
        assert all(
            not torch.equal(head.scores.weight, start) for head, start in zip(heads, before, strict=True)
        )
        return heads

    alone, first, second = trained(1)[0], *trained(2)
    assert torch.allclose(alone.scores.weight, first.scores.weight, atol=1e-6)
    assert not torch.allclose(first.scores.weight, second.scores.weight, atol=1e-2)


def test_the_interval_is_that_of_a_bootstrap(scripts) -> None:
    """60 of 200 photos are right for one way alone: 30 %, with an error of sqrt(0.3 * 0.7 / 200)."""
    share = scripts.probes.Metric("share", scripts.probes.share)
    base = torch.zeros(1, 200, 2, dtype=torch.float64)
    base[..., 0] = 1
    ours = base.clone()
    ours[0, :60, 1] = 1
    low, high = scripts.probes.interval(share, ours, base)
    error = 100 * math.sqrt(0.3 * 0.7 / 200)
    assert (low, high) == pytest.approx((30 - 1.96 * error, 30 + 1.96 * error), abs=0.7)
    assert scripts.probes.interval(share, ours, ours) == (0, 0)


def test_colours_are_principal_components(scripts) -> None:
    """Those of numpy's SVD, of all maps together, the same again, and of the same colours for equal cells."""
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randn(6, 4, 5, generator=generator), torch.randn(6, 9, 7, generator=generator)]
    maps[1][:, 0, 0] = maps[0][:, 0, 0]
    pictures = [np.array(each) for each in scripts.pictures.colours(maps)]
    assert [each.shape for each in pictures] == [(4, 5, 3), (9, 7, 3)]
    assert (pictures[0][0, 0] == pictures[1][0, 0]).all()
    again = [np.array(each) for each in scripts.pictures.colours([map.clone() for map in maps])]
    assert all((a == b).all() for a, b in zip(pictures, again, strict=True))

    cells = torch.cat([map.flatten(1) for map in maps], 1).double().numpy()
    _, _, parts = np.linalg.svd(cells - cells.mean(1, keepdims=True), full_matrices=False)
    drawn = np.concatenate([each.reshape(-1, 3) for each in pictures]).T.astype(float)
    inside = (drawn > 0) & (drawn < 255)
    for component in range(3):
        kept = inside[component]
        match = np.corrcoef(drawn[component][kept], parts[component][kept])[0, 1]
        assert abs(match) > 0.999


def test_colours_do_not_depend_on_the_direction_that_a_solver_gives_an_axis(scripts, monkeypatch) -> None:
    maps = [torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(5))]
    (before,) = scripts.pictures.colours(maps)
    solve = torch.linalg.eigh
    turned = lambda matrix: SimpleNamespace(eigenvectors=-solve(matrix).eigenvectors)  # noqa: E731
    monkeypatch.setattr(torch.linalg, "eigh", turned)
    (after,) = scripts.pictures.colours(maps)
    assert (np.array(before) == np.array(after)).all()


def test_a_table_has_a_panel_for_every_picture(scripts) -> None:
    red, green = Image.new("RGB", (3, 3), "red"), Image.new("RGB", (900, 900), "green")
    table = scripts.pictures.draw_table(["a", "b"], [[red, green], [green, red]])
    step = scripts.pictures.PANEL + scripts.pictures.GAP
    corners = [
        (column * step + 1, scripts.pictures.CAPTION + row * step + 1) for row in (0, 1) for column in (0, 1)
    ]
    assert [table.getpixel(corner) for corner in corners] == [
        (255, 0, 0),
        (0, 128, 0),
        (0, 128, 0),
        (255, 0, 0),
    ]


def saved(upsampler: StepwellUpsampler, folder) -> str:
    upsampler.save_pretrained(folder)
    return str(folder)


def test_models_are_loaded_by_what_their_folder_says(scripts, encoder, upsampler, tmp_path) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({k.removeprefix("encoder."): v for k, v in encoder.state_dict().items()}, weights)
    folder = saved(upsampler, tmp_path / "a")
    hidden, models = scripts.maps.load_models(str(weights), [f"ours={folder}"])
    image, map = torch.randn(1, 3, 40, 48), torch.randn(1, 32, 5, 6)
    assert torch.equal(hidden(image), encoder(image))
    assert torch.equal(models["ours"](map, image), upsampler(map, image))


def test_up_samplers_of_other_maps_are_refused(scripts, upsampler, tmp_path) -> None:
    first = saved(upsampler, tmp_path / "first")
    other = saved(
        StepwellUpsampler(StepwellUpsamplerConfig(**NANO, select_layer=-1, dim=32)), tmp_path / "other"
    )
    small = saved(StepwellUpsampler(StepwellUpsamplerConfig(**NANO, dim=32, levels=1)), tmp_path / "small")
    for named, words in (
        ([f"a={first}", f"b={other}"], "b takes maps of select_layer -1, and a of -2"),
        ([f"a={small}"], "no up-sampler of two levels"),
        ([first], "expected NAME=PATH"),
        ([f"a={first}", f"a={other}"], "each name once"),
    ):
        with pytest.raises(ValueError, match=words):
            scripts.maps.load_models("missing.safetensors", named)


def test_curves_are_read_by_metric(scripts, tmp_path) -> None:
    path = tmp_path / "metrics.csv"
    lines = [f"{step},0.1,{metric},{step}.5" for step in (10, 20) for metric in scripts.pictures.METRICS]
    path.write_text("\n".join(["step,epoch,metric,value", *lines, "20,0.1,grad_norm,7"]))
    curves = scripts.pictures.read_curves(str(path))
    assert curves == dict.fromkeys(scripts.pictures.METRICS, ([10, 20], [10.5, 20.5]))
    path.write_text("\n".join(["step,epoch,metric,value", *(line for line in lines if "4x" not in line)]))
    with pytest.raises(ValueError, match="has no eval_error_4x"):
        scripts.pictures.read_curves(str(path))


def test_a_probe_reports_each_way_against_the_first(scripts) -> None:
    """Two seeds, four photos: 75 and 25 % right, then all; only the second line tells a difference."""
    first = torch.ones(2, 4, 2, dtype=torch.float64)
    first[0, 0, 1] = first[1, :3, 1] = 0
    second = torch.ones_like(first)
    share = scripts.probes.Metric("top-1", scripts.probes.share)
    probe = scripts.probes.Probe(lambda *_: iter([("a", first), ("b", second)]), [share])
    lines = list(scripts.probes.report(probe, None, ROOT, {}))
    assert lines[0].startswith("a: top-1 50.0 ± 35.4; 4 images, ")
    assert lines[1].startswith("b: top-1 100.0 ± 0.0 (+50.0, ")


def write_data(folder: Path) -> None:
    """The three data sets, as small as they can be."""
    receipts, aerial = folder / "sroie_receipts", folder / "dubai_aerial_seg"
    for split in ("train", "val"):
        for place in (
            receipts / "images" / split,
            aerial / "images" / split,
            aerial / "labels" / split,
            folder / "grocery" / split / "apple",
            folder / "grocery" / split / "pear",
        ):
            place.mkdir(parents=True)
        picture(1, (60, 90)).save(receipts / "images" / split / "r.png")
        lines = [("A1", [5, 5, 40, 20]), ("B B", [5, 30, 40, 20]), ("b22", [50, 5, 30, 20])]
        coco = {
            "images": [{"id": 1, "file_name": f"images/{split}/r.png", "width": 90, "height": 60}],
            "annotations": [
                {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "text": text}
                for i, (text, box) in enumerate(lines)
            ],
            "categories": [{"id": 1, "name": "line"}],
        }
        (receipts / "annotations").mkdir(exist_ok=True)
        (receipts / "annotations" / f"textlines_{split}.json").write_text(json.dumps(coco))
        for name in ("a", "b"):
            picture(2, (230, 450)).save(aerial / "images" / split / f"{name}.png")
            labels = np.random.default_rng(3).choice([0, 1, 255], (230, 450)).astype(np.uint8)
            Image.fromarray(labels).save(aerial / "labels" / split / f"{name}.png")
        for name, seed in (("apple", 4), ("pear", 5)):
            picture(seed).save(folder / "grocery" / split / name / "1.png")
    (aerial / "classes.json").write_text(json.dumps(["land", "sea"]))


def test_every_probe_runs_on_its_data(scripts, encoder, upsampler, tmp_path, monkeypatch) -> None:
    """What is counted: two words of one receipt, known pixels of two tiles of two images, two photos."""
    write_data(tmp_path)
    monkeypatch.setattr(scripts.probes, "fit", lambda *_, **__: None)
    asked = []

    def guided(map: torch.Tensor, image: torch.Tensor, scale: int) -> torch.Tensor:
        asked.append((scale, *image.shape[2:], *map.shape[2:]))
        return scripts.maps.guided(upsampler)(map, image, scale)

    ways = {"bilinear": scripts.maps.bilinear, "guided": guided}
    counts = {
        name: dict(probe.counts(encoder, tmp_path, ways)) for name, probe in scripts.probes.PROBES.items()
    }
    assert {name: tuple(of["guided"].shape) for name, of in counts.items()} == {
        "ocr": (3, 1, 3),
        "segmentation": (3, 2, 4),
        "classification": (3, 2, 2),
    }
    assert (counts["ocr"]["guided"][..., 0] == 2).all()
    known = (np.random.default_rng(3).choice([0, 1, 255], (230, 450))[:224, :448] != 255).sum()
    assert (counts["segmentation"]["guided"].sum(-1) == int(known)).all()
    assert (counts["classification"]["guided"][..., 0] == 1).all()
    assert set(asked) == {(2, 56, 224, 7, 28), (4, 224, 224, 28, 28)}
    assert not torch.equal(counts["segmentation"]["guided"], counts["segmentation"]["bilinear"])


def test_words_are_learned_from_the_columns_they_take(scripts, encoder, tmp_path, monkeypatch) -> None:
    """The loss of two words in another order is torch's, of their own texts, in capitals, and columns."""
    write_data(tmp_path)
    losses = []
    monkeypatch.setattr(scripts.probes, "fit", lambda heads, maps, loss, **_: losses.append(loss))
    decoded = []
    monkeypatch.setattr(scripts.probes, "decode", lambda columns, _: decoded.append(len(columns)) or "")
    list(scripts.probes.ocr(encoder, tmp_path, {"bilinear": scripts.maps.bilinear}))
    assert sorted(decoded) == [21, 21, 21, 28, 28, 28]  # by three heads
    words = scripts.data.read_words(encoder, tmp_path / "sroie_receipts", "train")
    assert set(words.texts) == {"A1", "B22"}
    # the boxes are 40 x 20 and 30 x 20 pixels, at a height of 56 in 224, which is 56 columns of the 2x map
    assert dict(zip(words.texts, words.columns.tolist(), strict=True)) == {"A1": 28, "B22": 21}
    scores = torch.randn(2, 56, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    order = torch.tensor([1, 0])
    texts = [torch.tensor(["12AB".index(c) + 1 for c in words.texts[place]]) for place in order]
    lengths = torch.tensor([len(text) for text in texts])
    expected = F.ctc_loss(scores.transpose(0, 1), torch.cat(texts), words.columns[order], lengths)
    assert torch.allclose(losses[0](scores, order), expected)


def test_heads_see_the_maps_whose_places_they_are_told(scripts) -> None:
    """And every map once before one comes again."""
    maps, heads, told = torch.randn(6, 2, 3, 3), nn.ModuleList([nn.Conv2d(2, 1, 1)]), []

    def loss(scores: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        assert torch.allclose(scores, heads[0](maps[places]))
        told.extend(places.tolist())
        return scores.square().mean()

    optimiser = torch.optim.SGD(heads.parameters(), 0.1)
    scripts.probes.fit(heads, maps, loss, optimiser=optimiser, steps=4, batch=3)
    assert sorted(told[:6]) == sorted(told[6:]) == list(range(6))
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0)

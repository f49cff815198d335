"""Text from files and command lines: settings or one sentence, within limits, whatever is written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_gan.config import DCGANNetworks, RunConfig, kinds, mistakes
from dist_gan.config.mistakes import place_of, validate
from dist_gan.config.reader import load_config, read_settings, run_dir_of, to_yaml
from dist_gan.config.text import MAX_BYTES, MAX_NODES, apply_overrides, parse
from dist_gan.config.values import Choice, Section
from dist_gan.types import UserError


def refusal(tmp_path: Path, content: bytes | str) -> str:
    """The one line about a file that is no recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert time.monotonic() - began < 20
    (line,) = str(caught.value).splitlines()[1:]
    return line


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{','.join(['*' + old] * 9)}]}}\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [*a{n}]\n" for n in range(500))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "more than 20,000 values"), (MERGES, "more than 20,000 values"), (CHAIN, "deeper than 16"),
        ("a: [" + "1," * MAX_NODES + "]", "more than 20,000 values"), ("run: " + "[" * 3000, "sections lie deeper than 16"),
        ("{a: " * 3000, "sections lie deeper than 16"), ("- " * 3000, "sections lie deeper than 16"),
        ("a: &a {b: &b {c: *b}}", "a section holds itself"), ("#" * (MAX_BYTES + 1), "is larger than 256 KiB"),
    ],
    ids=["laughs", "merges", "chain", "many", "lists", "sections", "items", "itself", "large"],
)  # fmt: skip
def test_what_would_take_much_memory_is_refused_before_anything_is_built(text: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!set {b, c}", "a: !!omap [b: 1]", "a: !!pairs [b: 1]", "a: !!binary abc", "a: !!timestamp 2020-01-01",
        "run: {seed: !!int [1]}", "run: {dir: !!float x}", "run: {dir: !!bool x}", "!!map x", 'a: "\\UFFFFFFFF"',
        'run: {dir: "\\ud800"}', 'run: {dir: "a\\0b"}', 'run: {dir: "a\\nb"}', 'run: {dir: "a\\e[31mb"}', '"\\u202e": 1',
        "<<: 5", "a: {<<: [1, 2]}", "? [a]\n: b", "a: *y", "--- a\n--- b", "%YAML 9.9\n--- a", "a: \ud800", b"a: \xff",
    ],
)  # fmt: skip
def test_what_yaml_knows_and_settings_do_not_is_refused_in_one_line(text: str | bytes, tmp_path: Path) -> None:
    line = refusal(tmp_path, text)
    assert line.isprintable()
    assert "is not YAML" in line or "cannot be read" in line


@pytest.mark.parametrize(
    ("text", "value"),
    [("1:30", "1:30"), ("010", "010"), ("2026-01-01", "2026-01-01"), ("=", "="), ("9" * 5000, "9" * 5000), ("0x10", 16),
     ("1_000", 1000), ("-7", -7), (".5", 0.5), ("1.5e3", 1500.0), ("~", None), ("on", True)],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(text: str, value: Any) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("override", "place", "words"),
    [
        ("run.images==3", "run.images", "'=3' is no whole number"), ("run=3", "run", "3 is no section"),
        ("run.batch=1:30", "run.batch", "'1:30' is no whole number"), ("run.batch=\u0663", "run.batch", "whole number"),
        ("run.images=" + "9" * 5000, "run.images", "(5,002 characters)"), ("run.images=1e999", "run.images", "no whole"),
        ("run.seed=9" + "0" * 400 + "k", "run.seed", "whole number"),
        ("run.batch=.nan", "run.batch", "no number"), ("g_optim.lr=-.inf", "g_optim.lr", "no number"),
        ("data.kind=[1]", "data", "there is no kind"), ("networks.kind={a: b}", "networks", "there is no kind"),
        ("run.<<={a: 1}", "run.<<", "unknown key"), ("run.dir=[a]", "run.dir", "a valid string"),
        (". =3", "' '", ""), ("run.batch.x=3", "run.batch", "this section"),
    ],
)  # fmt: skip
def test_an_odd_override_is_one_line(override: str, place: str, words: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    (line,) = str(caught.value).splitlines()[1:]
    assert words in line
    assert len(line) < 700
    if words:
        assert line.startswith(f"  {place}: ")


@pytest.mark.parametrize("override", [".=", "a..b=1", "=", "a" + ".a" * 3000 + "=1", "a\nb=1", "\x1b[31m=1"])
def test_what_is_no_override_is_one_line_however_odd(override: str) -> None:
    with pytest.raises(UserError, match="is no override") as caught:
        load_config(None, [override])
    assert len(str(caught.value).splitlines()) == 2
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("override", "limit"),
    [
        ("run.batch=1e12", "1048576"), ("networks.g_width=1e12", "4096"), ("networks.latent_dim=1e12", "65536"),
        ("data.workers=1e12", "256"), ("data.lanes=1e12", "65536"), ("data.block=1e12", "65536"), ("data.count=1e12", ""),
        ("log.samples=1e12", "1024"), ("networks.classes=1e12", "100000"), ("recovery.window=1e12", "1000000"),
        ("runtime.micro_batch=1e12", "1048576"), ("runtime.threads=1e12", "1024"), ("data.memory=1e30", ""),
        ("data.cache=1e30", ""), ("networks.d_stddev=1e12", "1048576"), ("run.images=1e16", ""), ("log.every=1e30", ""),
        ("networks.d_width=1e12", "4096"), ("run.d_updates=1e12", "1000"), ("data.prefetch=1e12", "64"),
        ("checkpoint.keep=1e12", "1000000"), ("run.seed=1e30", "9223372036854776000"),
    ],
)  # fmt: skip
def test_a_size_beyond_reason_is_refused_with_its_limit(override: str, limit: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, [override])
    lines = str(caught.value).splitlines()[1:]
    assert any(line.startswith(f"  {override.split('=')[0]}: ") and limit in line for line in lines), lines


def test_every_number_that_is_counted_has_an_upper_limit() -> None:
    for name, section in RunConfig.model_json_schema()["$defs"].items():
        for key, field in section.get("properties", {}).items():
            for kind in (field, *field.get("anyOf", [])):
                if kind.get("type") == "integer":
                    assert {"le", "lt", "maximum", "exclusiveMaximum", "enum"} & set(kind), f"{name}.{key}"


# -- places -----------------------------------------------------------------------------------------------------------

PLACES = ("run.dir", "run.init_from", "run.resume", "data.url", "data.disk_cache")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("~/x", "{home}/x"), ("file:///x/y", "/x/y"), ("FILE:///x", "/x"), ("file://localhost/x", "/x"), ("file:/x", "/x"),
        ("file:///a%20b", "/a%20b"), ("file://~/x", "{home}/x"), ("runs/x", "runs/x"), ("./x", "./x"), ("a~b", "a~b"),
    ],
)  # fmt: skip
def test_a_local_path_has_one_spelling_in_every_setting(
    place: str, text: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(None, ["data.kind=shards", "data.url=x", f"{place}={text}"])
    section, key = place.split(".")
    expected = path.format(home=tmp_path)
    assert getattr(getattr(config, section), key) == expected
    assert f"{key}: {expected}" in to_yaml(config)
    if place == "run.dir":
        assert run_dir_of(None, [f"run.dir={text}"]) == expected


def test_folders_of_a_mixture_have_one_spelling_too_and_come_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    base = ["data.kind=shards", "data.url=x"]
    assert load_config(None, [*base, "data.mix={~/a: 2}"]).data.sources == {"x": 1, f"{tmp_path}/a": 2}
    with pytest.raises(UserError, match=r"data\.mix: .*two of these are the same"):
        load_config(None, [*base, "data.mix={~/a: 2, 'file://~/a': 1}"])
    with pytest.raises(UserError, match=r"data\.mix: .*is data\.url too"):
        load_config(None, [*base, "data.mix={'file:x': 2}"])


@pytest.mark.parametrize(
    "text", ["s3://b/x", "memory://x", "pipe:cat x", "file://", "''", "5", '"a\\0b"', "https://h/x"]
)
def test_what_is_no_local_folder_names_no_run_folder(text: str) -> None:
    assert run_dir_of(None, [f"run.dir={text}"]) is None
    with pytest.raises(UserError, match=r"run\.dir"):
        load_config(None, [f"run.dir={text}"])


@pytest.mark.parametrize("place", [*PLACES, "data.mix"])
@pytest.mark.parametrize(
    "secret",
    ["s3://k:SECRET@b/x", "https://h/x?sig=SECRET", "//u:SECRET@h", "s3:/k:SECRET@b", "k:SECRET@b/x", "s3://k:SECRET"],
)
def test_a_setting_with_a_secret_is_refused_and_never_told(place: str, secret: str) -> None:
    value = f"{{'{secret}': 1}}" if place == "data.mix" else f"'{secret}'"
    for name in (place, place + "x", "data.knd", "networks.kind", "checkpoint.keep_best", "run.batch"):
        with pytest.raises(UserError) as caught:
            load_config(None, ["data.kind=shards", "data.url=x", f"{name}={value}"])
        assert "SECRET" not in str(caught.value)


# -- every text -------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    ["run", "data", "networks", "g_optim", "kind", "lr", "batch", "dir", "url", "mix", "adam", "shards", "number", "ramp",
     "start", "[key]", "a.b", "", "<<", "s3://k:PLANTED@b"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), KEYS,
    st.sampled_from(["https://h/x?s=PLANTED", "pipe:cat PLANTED", "1:30", "9" * 400, "\x1b[2J", "10M", "sgd", "points"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
)
SECTIONS = st.dictionaries(st.one_of(st.sampled_from(list(RunConfig.model_fields)), KEYS), VALUES, max_size=4)


@given(raw=SECTIONS)
@settings(max_examples=150, deadline=2000)
def test_reading_ends_and_names_a_place_whatever_the_sections_hold(raw: dict[str, Any]) -> None:
    config, mistakes = validate(raw)
    assert isinstance(config, RunConfig)
    assert all(text.startswith(place) for place, text in mistakes)


@given(
    text=st.one_of(
        st.text(max_size=40),
        st.lists(
            st.sampled_from(
                [
                    "run",
                    ": ",
                    "{",
                    "}",
                    "[",
                    "]",
                    "\n",
                    "  ",
                    "- ",
                    "&a ",
                    "*a",
                    "!!set ",
                    "!!int ",
                    "<<",
                    "'",
                    '"',
                    "\\",
                    "dir",
                    "~",
                    "s3://k:PLANTED@b ",
                    "1:30",
                    "#",
                    "|",
                    ">",
                    "?",
                    "%",
                    "\x1b",
                    "\ud800",
                    "2026-01-01",
                    "=",
                    ",",
                    ".",
                    "batch",
                    "data",
                ]
            ),
            max_size=14,
        ).map("".join),
    ),
    name=st.sampled_from(["", "run.dir=", "run=", "data.mix=", "g_optim.lr=", "run.dir.x="]),
)
@settings(max_examples=250, deadline=2000)
def test_any_text_gives_settings_or_a_report_that_prints_and_keeps_secrets(text: str, name: str) -> None:
    path = Path("/nonexistent") / text.replace("\0", "") if not name else None
    for arguments in ((None, [name + text]), (path, [])):
        report = ""
        try:
            load_config(*arguments)
        except UserError as error:
            report = str(error)
        assert "PLANTED" not in report or "s3://k:PLANTED@b" not in text
        assert all(line.isprintable() for line in report.split("\n"))
        assert report.encode() is not None
    raw: dict[str, Any] = {}
    apply_overrides(raw, [name + text], default_kinds={})


@pytest.mark.parametrize(
    ("location", "place"),
    [
        (("g_optim", "adam", "adam"), "g_optim.adam"), (("data", "shards", "mix", "k", "[key]"), "data.mix.k"),
        (("g_optim", "sgd", "lr", "ramp", "foo"), "g_optim.lr.foo"), (("objective", "r1_gamma", "number"), "objective.r1_gamma"),
        (("nope", "adam"), "nope.adam"), (("data",), "data"), ((), "the file"), (("networks", "mlp", "mlp"), "networks.mlp"),
    ],
)  # fmt: skip
def test_a_location_is_the_path_in_the_users_file(location: tuple[str, ...], place: str) -> None:
    assert ".".join(place_of(location)) == place


class Extra(Section):
    """Networks of a kind that only the schema of a test has."""

    kind: Literal["extra"] = "extra"
    girth: int = 3


@pytest.mark.timeout(30)
def test_a_mistyped_key_of_a_kind_that_is_new_to_the_schema_is_named_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A list of kinds kept beside the schema, and missing one, once sent the reader in a circle."""

    class Wider(RunConfig):
        networks: Annotated[
            DCGANNetworks | Extra, Choice({"dcgan": DCGANNetworks, "extra": Extra}, default="dcgan")
        ] = DCGANNetworks()

    for module in (mistakes, kinds):
        monkeypatch.setattr(module, "RunConfig", Wider)
    config, found = mistakes.validate({"networks": {"kind": "extra", "girht": 5}, "run": {"batch": 32}})
    assert config.networks == Extra()  # type: ignore[comparison-overlap]
    assert config.run.batch == 32
    assert [place for place, _ in found] == ["networks.girht"]
    assert "extra: kind, girth" in found[0][1]


@pytest.mark.timeout(30)
def test_reading_ends_with_a_schema_whose_own_defaults_are_not_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake lies in no entry of the user's, so that there is none to take out."""

    class Lacking(RunConfig):
        more: Section

    for module in (mistakes, kinds):
        monkeypatch.setattr(module, "RunConfig", Lacking)
    with pytest.raises(ValueError, match=r"the defaults are not valid[\s\S]*more"):
        mistakes.validate({"networks": {"girht": 5}})


def test_a_key_that_is_called_like_a_kind_is_an_unknown_key() -> None:
    """A key that could not be found again once sent the reader in a circle."""
    reading = read_settings(None, ["g_optim.adam=3", "networks.mlp.mlp=1", "g_optim.lr.number=1"])
    assert [text.partition(":")[0] for text in reading.mistakes] == [
        "g_optim.lr.number",
        "g_optim.adam",
        "networks.mlp",
    ] or ({"g_optim.adam", "networks.mlp"} <= {text.partition(":")[0] for text in reading.mistakes})

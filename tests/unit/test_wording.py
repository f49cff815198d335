"""Text from outside on its way to a terminal, log or error: no secret of a URL, no sign that a terminal obeys."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_gan import cli
from dist_gan.run_folder import write_outcome
from dist_gan.tracker import Tracker
from dist_gan.types import TrainingFailed, UserError
from dist_gan.wording import redact, report, safe

SECRETS = (
    "s3://key:{}@bucket/x", "S3://key:{}@bucket/x", "https://h/x?sig={}", "https://h/x#token={}", "https://{}@h/x",
    "https://user:@{}@h", "https://user:/{}@h", "https://user:12/{}@h", "simplecache::https://user:{}@h/x",
    "zip://a?{}::s3://k:{}@b", "pipe:curl -H '{} {}' https://h", "PIPE:cat {}", "data:text/plain,{}", "s3:/key:{}@b",
    "https:user:{}@h", "s3:b?sig={}", "//key:{}@h/x", "//h/x?sig={}", "key:{}@bucket/x", "nonsense://a:{}@b?{}",
    "file://user:{}@h/x", "://user:{}@h", "s_3+x.y-z://user:{}@h", "az://{}@container/x?sig={}",
)  # fmt: skip
PLACES = (
    "{}", "data.url: {} is wrong", "data.url: '{}' is wrong; give another", "({}); choose", "unknown key (value {!r})",
    "'data.url={}': is no override", "{!r}: is no override", "before\nafter {}", "two: {}, {}; more",
    "{{'kind': 's3', 'url': {!r}}}", "see https://github.com/a/b and {}",
)  # fmt: skip


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("place", PLACES)
def test_no_secret_of_a_url_is_shown_wherever_it_stands(url: str, place: str) -> None:
    for secret in (
        "SECRET",
        "SE::CRET",
        "SE'CRET",
        'SE"CRET',
        "SE,[(CRET",
        "SE\\CRET",
        "SE@CRET",
        "SE\x1b\nCRET",
        "SÉ\xa0CRET",
    ):
        filled = url.format(secret, secret)
        shown = safe(place.format(filled, filled))
        assert "CRET" not in shown, shown
        assert safe(shown) == shown
        assert "CRET" not in str(UserError(place.format(filled, filled)))


@given(
    secret=st.text(st.characters(exclude_characters=" "), max_size=20).map(lambda s: f"{s}PLANTED{s}"),
    scheme=st.sampled_from(["s3", "HTTPS", "gs", "x.y+z", ""]),
    before=st.text(max_size=10),
)
@settings(max_examples=200, deadline=None)
def test_a_secret_of_any_signs_is_not_shown(secret: str, scheme: str, before: str) -> None:
    for url in (f"{scheme}://key:{secret}@bucket/x", f"{scheme}://bucket/x?sig={secret}"):
        for text in (f"{before} {url}", f"{before}{url!r}", f"{before} {[url]}", f"{before} { {url: url} }"):
            shown = safe(text)
            assert "PLANTED" not in shown, (text, shown)
            assert shown.isprintable()
            assert safe(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "run.dir: /a/b@c is in use; wait", "s3://bucket/a/b", "see (s3://a/b), s3://c/d; s3://e", "runs/what?.png", "a#1 b",
        "data: there is no kind 'lmdb'; choose one of 'shapes', 'points'", "left 12m04s", "https://h.de:8080/a@b",
        "abfs://container@account.dfs.core.windows.net/x", "file:///a/what?/b#1", "/a//b@c", "http:/x", "C:x", "é 語 🙂",
        "networks.kind: points go with mlp", "[s3://a/b]", "{'a': 's3://b/x'}", "webdataset's `pipe:...`", "memory://a::b",
        "https://h/users/@me/x", "http://[::1]:90/a@b", "git@github.com:a/b", "g_optim.lr: 0.1 -> 0.2",
    ],
)  # fmt: skip
def test_a_text_without_a_secret_stays_as_it_is(text: str) -> None:
    assert safe(text) == text


def test_the_words_around_a_secret_are_kept() -> None:
    assert safe("see (https://h/x?sig=S); choose") == "see (https://h/x); choose"
    assert safe("data.url: 's3://u:S@b/x' is refused") == "data.url: 's3://b/x' is refused"
    assert safe("'data.url=pipe:cat S': is no override") == "'data.url=pipe:...': is no override"


@pytest.mark.parametrize(
    "sign",
    ["\x00", "\x07", "\x1b[31m", "\r", "\n", "\x0b", "\x85", "\x9b31m", "\x7f", "\u2028", "\u2029", "\u202e", "\u2066", "\ufeff",
     "\ud800", "\u200b"],
)  # fmt: skip
def test_a_sign_that_does_not_print_is_written_as_an_escape(sign: str) -> None:
    shown = safe(f"a{sign}b")
    assert shown.isprintable()
    assert shown.startswith("a\\")
    assert shown.encode()


def test_a_line_of_the_program_cannot_be_forged() -> None:
    name = "cat\ndist_gan: finished\r\ndist-gan: fine"
    for text in (safe(name), str(UserError(f"{name}: bad")), str(TrainingFailed(name))):
        assert len(text.splitlines()) == 1
    for line in report(f"head\n{name}").splitlines()[1:]:
        assert line.startswith("  ")


def test_an_error_keeps_its_own_lines_wherever_it_goes() -> None:
    error = UserError("two:", "- one\nforged", "  deep")
    assert str(error) == "two:\n  - one\\nforged\n  deep"
    assert report(str(error)) == str(error)
    assert str(UserError(*str(error).split("\n"))) == str(error)
    again = pickle.loads(pickle.dumps(error))  # as a worker's error comes back
    assert isinstance(again, UserError)
    assert str(again) == str(error)
    assert isinstance(UserError("x"), ValueError)
    assert isinstance(TrainingFailed("x"), RuntimeError)


def test_what_is_kept_of_a_run_holds_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "pipe:x s3://u:SECRET@b/x\x1b[31m\ndist_gan: finished"
    write_outcome(str(tmp_path), "failed", code=3, reason=bad)
    tracker = Tracker(tmp_path, enabled=True, attempt=1, total=10, resumed_at=0, config_yaml=f"run:\n  dir: {bad}\n")
    tracker.say(bad)
    tracker.event("bad_sample", images=3, key=bad, notes=[bad, {bad: 1}])
    tracker.close()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"outcome.json", "events.jsonl"} <= {path.name for path in files}
    assert any("tfevents" in path.name for path in files)
    for path in files:
        assert b"SECRET" not in path.read_bytes(), path
    texts = [json.loads((tmp_path / "outcome.json").read_text())["reason"], capsys.readouterr().err]
    texts += [json.loads(line)["key"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    for text in texts:
        assert "SECRET" not in text
        assert "\x1b" not in text
        assert not any(line.startswith("dist_gan:") for line in text.splitlines())


def test_the_command_prints_no_escape_of_an_exported_file_and_no_secret_of_an_argument(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    for content in (b'{"name": "\x1b[31m\xff"}\ndist-gan: fine', b'{"\\u001b[31m": "\\ndist-gan: fine"}'):
        (tmp_path / "config.json").write_bytes(content)
        assert cli.main(["inspect", str(tmp_path)]) in (0, 2)
        told = capsys.readouterr()
        assert "\x1b" not in told.out + told.err
        assert "\ndist-gan: fine" not in told.out + told.err
    for command in (["inspect"], ["verify"], ["index"], ["sample"], ["export"], ["pack"]):
        places = ["s3://k:SECRET@b/x", *([str(tmp_path / "out")] if command[0] in ("sample", "export", "pack") else [])]
        assert cli.main([*command, *places]) == 2
        told = capsys.readouterr()
        assert "SECRET" not in told.out + told.err


def test_a_known_url_is_redacted_blanks_and_all() -> None:
    assert redact("s3://k:SECRET and more@b/x y") == "s3://b/x y"
    assert redact("https://user:SE::CRET@h/x") == "https://h/x"

from __future__ import annotations

import gzip
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import nas.tasks.corpus
import nas.tasks.data
import nas.tasks.hub
from nas.errors import InvalidInput
from nas.planning.recipe import TEXT
from nas.tasks.corpus import ALPHABET, learn_tokens, load_text
from nas.tasks.data import MAX_BYTES, Arrays, TaskData
from nas.tasks.hub import HubTexts
from tests.support.corpora import SMALL, SMALL_BPE
from tests.support.paths import ROOT

assert SMALL.least_tokens == SMALL_BPE.least_tokens == 65


def characters(part: Arrays) -> str:
    return bytes(np.frombuffer(ALPHABET, dtype=np.uint8)[part["tokens"]]).decode()


def sizes(data: TaskData) -> tuple[int, int]:
    return len(data.train["tokens"]), len(data.validation["tokens"])


def prose(words: int, seed: int = 0) -> str:
    """Sentences of made-up words, some of them with letters beyond ASCII."""
    rng = np.random.default_rng(seed)
    syllables = ["ka", "to", "mi", "ren", "sol", "ü", "né", "字", "λά", "🙂"]
    lexicon = ["".join(rng.choice(syllables, rng.integers(1, 4))) for _ in range(200)]
    picked = rng.choice(lexicon, words)
    return "".join(w + (".\n    " if i % 12 == 11 else " ") for i, w in enumerate(picked))


def refusal(data: object, recipe: object = SMALL, **options: str) -> str:
    with pytest.raises(InvalidInput) as caught:
        load_text(recipe, data, **options)  # type: ignore[arg-type]
    assert caught.value.field == "data"
    assert "accepted: a text file or a folder" in str(caught.value)
    return str(caught.value)


def test_the_default_is_real_text() -> None:
    data = load_text(TEXT, None)
    train, validation = sizes(data)
    assert data.train["tokens"].dtype == np.uint8
    assert train + validation > 5_000_000
    assert 0.05 <= validation / (train + validation) < 0.1
    counts = re.fullmatch(r"([\d,]+) files, ([\d,]+) characters, ([\d,]+) files .*", data.summary)
    assert counts, data.summary
    files, size, left_out = (int(n.replace(",", "")) for n in counts.groups())
    assert files > 500
    assert size == train + validation
    assert left_out > 0
    again = load_text(TEXT, None)
    assert (data.content, data.fingerprint) == (again.content, again.fingerprint)
    decoded = characters({"tokens": data.train["tokens"][:200_000]})
    assert "def " in decoded
    assert "import " in decoded


def test_ninety_six_characters() -> None:
    assert len(set(ALPHABET)) == 96
    assert set(ALPHABET) == {10, *range(32, 127)}


def test_files_with_other_characters_are_left_out_and_counted(text_folder: Path) -> None:
    data = load_text(SMALL, text_folder)
    left_out = "2 files left out (2 with other characters)"
    assert data.summary == f"12 files, 36,000 characters, {left_out}"
    assert data.train["tokens"].max() <= 95


def test_the_split_is_by_file(text_folder: Path) -> None:
    data = load_text(SMALL, text_folder)
    held, kept = characters(data.validation), characters(data.train)
    held_files, kept_files = (set(re.findall(r"file \d+(?=:)", part)) for part in (held, kept))
    assert held_files
    assert len(held_files) + len(kept_files) == 12
    assert not held_files & kept_files


@pytest.mark.parametrize(
    ("train", "held", "beside"),
    [
        ("train/a.txt", "valid/b.txt", "notes/c.txt"),
        ("Training/deep/a", "DEV/b", "c.txt"),
        ("train/a", "validation/b", "test/c"),
        ("wiki.train.tokens", "wiki.valid.tokens", "README.md"),
        ("train.txt", "val.txt", "test.txt"),
    ],
)
def test_a_split_of_its_own(tmp_path: Path, train: str, held: str, beside: str) -> None:
    texts = {train: "to learn from\n" * 300, held: "to be asked for\n" * 90, beside: "other\n"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    names = [re.split(r"[/.]", name.removeprefix("wiki."))[0] for name in (train, held)]
    for recipe in (SMALL, replace(SMALL_BPE, vocabulary=262)):
        data = load_text(recipe, tmp_path)
        assert f", 1 files left out (1 beside {names[0]} and {names[1]})" in data.summary
        if recipe is SMALL:
            assert (characters(data.train), characters(data.validation)) == (
                texts[train], texts[held]
            )  # fmt: skip
    # a validation text that is one for training, too, is none
    (tmp_path / held).with_name("again." + Path(held).name).write_text(texts[train])
    assert "1 equal to one for training" in load_text(SMALL, tmp_path).summary
    (tmp_path / held).write_text("too short\n")
    assert "training and validation have 4,200 and 10 bytes, and need 65" in refusal(tmp_path)


def test_programs_of_such_names_are_no_split(tmp_path: Path) -> None:
    for name in ("train.py", "test.py", "model.py"):
        (tmp_path / name).write_text(f"# {name}\n" * 300)
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.txt").write_text("training alone\n" * 300)
    assert load_text(SMALL, tmp_path).summary.startswith("4 files, ")


def test_hidden_folders_and_links_are_left_out_and_counted(
    text_folder: Path, tmp_path: Path
) -> None:
    content = load_text(SMALL, text_folder).content
    text_folder = Path(shutil.copytree(text_folder, tmp_path / "copy"))
    for name in (".git", ".ipynb_checkpoints", "site-packages"):
        (text_folder / name).mkdir()
        (text_folder / name / "a.txt").write_text("none of it\n" * 300)
    (text_folder / "link.txt").symlink_to(text_folder / ".git" / "a.txt")
    data = load_text(SMALL, text_folder)
    assert data.content == content
    counts = "(3 hidden or system folders, 1 linked, 2 with other characters)"
    assert data.summary.endswith(f", 6 files left out {counts}")


@pytest.mark.parametrize(
    ("content", "says", "kind"),
    [
        (b"a line\r\n", r"lines end in \r\n, as Windows has; convert them to \n", "of Windows"),
        (b"a line\r", r"lines end in \r; convert them to \n", "with other characters"),
        (b"a\tline\n", "the byte 0x09 at offset 1; the recipe gpt-bpe-1 takes", "with other char"),
        ("a line\n".encode("utf-16"), "this file is UTF-16: save it as UTF-8", "in UTF-16"),
        (
            gzip.compress(b"a line\n", mtime=0),
            "this file is gzip: unpack it",
            "with other characters",
        ),
    ],
)
def test_texts_that_cannot_be_used_have_a_reason(
    tmp_path: Path, content: bytes, says: str, kind: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content * 1000)
    assert says in refusal(tmp_path / "a.txt").encode().decode("unicode_escape").replace(
        "\r", r"\r"
    ).replace("\n", r"\n")
    assert kind in refusal(tmp_path)
    if kind in ("of Windows", "with other characters"):
        assert "the recipe gpt-bpe-1 takes any UTF-8" in refusal(tmp_path)


def test_one_file_is_split_at_its_end(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    text = "".join(f"line {i}\n" for i in range(30_000))  # longer than a piece that is read
    file.write_text(text)
    data = load_text(SMALL, file)
    cut = len(text) - len(text) // 20
    assert (characters(data.train), characters(data.validation)) == (text[:cut], text[cut:])


def test_equal_files_count_once_so_that_none_is_on_both_sides(tmp_path: Path) -> None:
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text("the same text in every file\n" * 200)
    (tmp_path / "other.txt").write_text("another text altogether\n" * 200)
    (tmp_path / "empty.txt").touch()
    data = load_text(SMALL, tmp_path)
    assert data.summary.startswith("2 files, 10,400 characters, 10 files left out")
    assert data.summary.endswith("(1 empty, 9 equal to another)")
    assert sum(sizes(data)) == 200 * (28 + 24)


@pytest.mark.parametrize("seed", range(8))
def test_a_large_file_never_becomes_the_validation_text(tmp_path: Path, seed: int) -> None:
    (tmp_path / "large.txt").write_text(f"large {seed}\n" * 10_000)
    (tmp_path / "small.txt").write_text(f"small {seed}\n" * 100)
    train, validation = sizes(load_text(SMALL, tmp_path))
    assert 0.04 < validation / (train + validation) <= 0.1


def test_the_content_follows_the_text_and_the_split(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("abcdefghij" * 1000)
    before = load_text(SMALL, file)
    file.write_text("abcdefghij" * 999 + "abcdefghiJ")
    after = load_text(SMALL, file)
    assert before.content != after.content
    assert before.fingerprint != after.fingerprint
    assert load_text(replace(SMALL, depth=2), file).content == after.content
    assert load_text(replace(SMALL, depth=2), file).fingerprint != after.fingerprint


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("missing", "this path does not exist"),
        ("nul", "this path cannot be read"),
        ("fifo", "neither a regular file nor a folder"),
        ("empty file", "this file is empty"),
        ("empty folder", "0 files, 0 characters, 0 files left out"),
        ("filtered", "this file has the byte 0xc3 at offset 100001"),
        ("short", "5 and 0 bytes, and need 65 tokens each"),
        ("few left", "9 characters, 2 files left out (1 in UTF-16, 1 with other characters)"),
    ],
)
def test_unusable_data_is_refused_with_its_name(case: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    if case == "empty file":
        path.write_text("")
    elif case == "empty folder":
        path.mkdir()
    elif case == "filtered":
        path.write_bytes(b"." * 100_001 + "\u00fcber\n".encode() * 1000)
    elif case == "short":
        path.write_text("short")
    elif case == "few left":
        path.mkdir()
        (path / "a").write_bytes(b"\xff\xfe")
        (path / "b").write_bytes(b"tab\t" * 1000)
        (path / "c").write_bytes(b"ninechars")
    elif case == "fifo":
        os.mkfifo(path)
    elif case == "nul":
        path = tmp_path / "a\x00b"
    assert says in refusal(path)
    message = refusal(path, shown="my data")
    assert says in message
    assert "got my data;" in message
    assert str(tmp_path) not in message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"fine\n" * 20_000 + b"\x00", "the byte 0x00 at offset 100000"),
        (b"fine\xff\x00", "the byte 0xff at offset 4"),
        (b"fine\x00\xff", "the byte 0x00 at offset 4"),
        (b"." * 65_535 + "é".encode() + b"..\xc3", "the byte 0xc3 at offset 65539"),
        (b"." * 65_535 + b"\xc3.", "the byte 0xc3 at offset 65535"),
    ],
)
def test_text_for_byte_pairs_is_utf8_without_nul(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "data").write_bytes(content)
    assert says in refusal(tmp_path / "data", SMALL_BPE)


def sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


@pytest.mark.parametrize("recipe", [SMALL, SMALL_BPE])
def test_large_files_are_not_read(
    tmp_path: Path, recipe: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = sparse(tmp_path / "huge", 10 << 30)
    assert f"at most {MAX_BYTES:,} bytes" in refusal(huge, recipe)
    assert "the byte 0x00 at offset 0" in refusal(sparse(tmp_path / "large", 1 << 30), recipe)
    # in a folder what does not begin as text is left out, whatever its size
    (tmp_path / "text").write_text("one two three four\n" * 1000)
    assert "2 files left out" in load_text(SMALL, tmp_path).summary
    for module in (nas.tasks.corpus, nas.tasks.data):
        monkeypatch.setattr(module, "MAX_BYTES", 1 << 15)
    (tmp_path / "other").write_text("five six seven eight\n" * 1000)
    assert "at most 32,768 bytes" in refusal(tmp_path, recipe)


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("recipe", [SMALL, SMALL_BPE])
@pytest.mark.parametrize("kind", ["0.pkl", "0.PT", "0.pth", "2.bin", "3.txt", "4.dat", "5", "npy"])
def test_pickles_are_never_unpickled(tmp_path: Path, recipe: object, kind: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / f"data{kind}"
    if kind == "npy":
        np.save(path.with_suffix(".npy"), np.array([Marker(marker)] * 99), allow_pickle=True)
        path = path.with_suffix(".npy")
    else:
        path.write_bytes(pickle.dumps([Marker(marker)] * 99, protocol=int(kind[0])))
    assert "is a pickle, which is never unpickled" in refusal(path, recipe)
    assert not marker.exists()


def test_byte_pairs_decode_to_the_text(tmp_path: Path) -> None:
    """Text of several pieces, split inside a word."""
    text = prose(40_000)
    encoded = text.encode()
    assert len(encoded) > 3 << 16
    file = tmp_path / "prose.txt"
    file.write_bytes(encoded)
    data = load_text(SMALL_BPE, file)
    train, validation = data.train["tokens"], data.validation["tokens"]
    assert train.dtype == validation.dtype == np.uint16
    assert 256 <= train.max() < 300
    cut = len(encoded) - len(encoded) // 20
    while encoded[cut] & 0xC0 == 0x80:
        cut -= 1
    kept, held = encoded[:cut].decode(), encoded[cut:].decode()
    tokenizer = learn_tokens([kept], 300)
    assert tokenizer.decode(validation.tolist()) == held
    assert tokenizer.decode(train.tolist()) == kept
    # the pieces are cut where words end anyway
    assert tokenizer.encode(kept).ids == train.tolist()
    share = (len(train) + len(validation)) / len(text)
    words = f"{len(text):,} characters, 0 files left out, {share:.3f} tokens per character"
    assert data.summary == f"1 files, {words}"


def test_equal_text_gives_equal_tokens(tmp_path: Path) -> None:
    """In this process and in another one with other hashes, which no thread keeps from forking."""
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(prose(2000, i), encoding="utf-8")
    contents = {load_text(SMALL_BPE, tmp_path).content for _ in range(3)}
    code = (
        "import os, sys, time; from nas.tasks.corpus import load_text\n"
        "from tests.support.corpora import SMALL_BPE\n"
        "threads = os.listdir('/proc/self/task')\n"
        "print(load_text(SMALL_BPE, sys.argv[1]).content, flush=True)\n"
        "until = time.monotonic() + 10\n"  # a thread that was joined still has to leave the list
        "while os.listdir('/proc/self/task') != threads: assert time.monotonic() < until\n"
        "if pid := os.fork(): os.waitpid(pid, 0)\n"
        "else: print(load_text(SMALL_BPE, sys.argv[1]).content)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, check=False, cwd=ROOT,
        env=environment,
    )  # fmt: skip
    assert result.stderr == ""
    assert result.stdout.split() == [*contents, *contents]


def test_byte_pairs_are_learnt_from_the_training_text_alone(tmp_path: Path) -> None:
    train, secret = "abab cdcd efef ghgh\n" * 1900, "xyzzy xyzzy xyz qqq\n" * 100
    file = tmp_path / "one.txt"
    file.write_text(train + secret)
    recipe = replace(SMALL_BPE, vocabulary=262)
    data = load_text(recipe, file)
    held = data.validation["tokens"]
    tokenizer = learn_tokens([train], 262)
    assert tokenizer.decode(held.tolist()) == secret
    assert held.max() < 256 <= data.train["tokens"].max()
    assert learn_tokens([secret], 262).encode("xyzzy").ids != tokenizer.encode("xyzzy").ids


def test_a_vocabulary_that_the_text_does_not_yield_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("ab ab\n" * 2000)
    with pytest.raises(InvalidInput, match="at most 258, which the training text yields") as caught:
        load_text(SMALL_BPE, file)
    assert caught.value.field == "vocabulary"
    load_text(replace(SMALL_BPE, vocabulary=258), file)
    with pytest.raises(InvalidInput, match="vocabulary: got 255; accepted: at least 256"):
        load_text(replace(SMALL_BPE, vocabulary=255), file)


def test_too_few_tokens_are_too_few_however_many_bytes(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("a very long sentence again and again\n" * 50)
    recipe = replace(SMALL_BPE, vocabulary=270)
    assert re.search(r"have \d+ and \d\d tokens, and need 65 tokens each", refusal(file, recipe))


def test_one_endless_word_is_learnt_from(tmp_path: Path) -> None:
    file = tmp_path / "dna.txt"
    file.write_text("".join(np.random.default_rng(0).choice(list("ACGT"), 300_000)))
    data = load_text(SMALL_BPE, file)
    assert sum(sizes(data)) < 300_000 / 2


def test_long_text_is_counted_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "one.txt"
    file.write_text(prose(40_000), encoding="utf-8")
    whole = load_text(SMALL_BPE, file)
    monkeypatch.setattr(nas.tasks.corpus, "COUNTED_CHARACTERS", 1 << 16)
    part = load_text(SMALL_BPE, file)
    assert part.content != whole.content
    assert abs(sum(sizes(part)) / sum(sizes(whole)) - 1) < 0.05


def test_binary_files_are_left_out_of_byte_pairs(text_folder: Path, tmp_path: Path) -> None:
    assert load_text(SMALL_BPE, text_folder).summary.startswith("14 files, 36,900 characters, 0 ")
    (tmp_path / "text").write_text(prose(2000), encoding="utf-8")
    (tmp_path / "nul").write_bytes(b"text\x00")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    assert ", 2 files left out (2 binary), " in load_text(SMALL_BPE, tmp_path).summary


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u4", "u8"])
def test_tokens_of_another_tokenizer(tmp_path: Path, dtype: str) -> None:
    tokens = np.random.default_rng(0).integers(0, 200, 10_000).astype(dtype)
    np.save(tmp_path / "t.npy", tokens)
    recipe = replace(SMALL_BPE, vocabulary=200)
    data = load_text(recipe, tmp_path / "t.npy")
    assert sizes(data) == (9500, 500)
    assert data.train["tokens"].dtype == data.validation["tokens"].dtype == np.uint16
    joined = np.concatenate([data.train["tokens"], data.validation["tokens"]])
    assert np.array_equal(joined, tokens)
    assert data.summary == "10,000 tokens, tokenised before"
    np.save(tmp_path / "u2.npy", tokens.astype("u2"))
    assert load_text(recipe, tmp_path / "u2.npy").content == data.content
    with pytest.raises(InvalidInput, match="200: the largest token in the data is 199") as caught:
        load_text(replace(recipe, vocabulary=199), tmp_path / "t.npy")
    assert caught.value.field == "vocabulary"


def test_tokens_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    for array, says in (
        (np.zeros(5000, "i4"), "this one int32 of shape (5000,)"),
        (np.zeros(5000, "f4"), "this one float32"),
        (np.zeros((50, 100), "u2"), "of shape (50, 100)"),
        (np.zeros(0, "u2"), "this one is empty"),
        (np.zeros(1000, "u2"), "have 950 and 50 tokens, and need 65 each"),
    ):
        np.save(path, array)
        assert says in refusal(path, SMALL_BPE, shown="mine")
    np.save(path, np.zeros(5000, "u2"))
    assert "with tokenizer=bpe a .npy" in refusal(path, SMALL)
    whole = path.read_bytes()
    for broken in (
        whole[:-1],
        whole[:50],
        whole[:7],
        whole.replace(b"(5000,),", b"(1<<99,)"),
        whole.replace(b"(5000,), ", b"(9**99**9"),
        whole.replace(b"'descr'", b"((((((("),
    ):
        path.write_bytes(broken)
        message = refusal(path, SMALL_BPE, shown="mine")
        assert "this one cannot be read" in message or "this one is truncated" in message
        assert str(tmp_path) not in message


def test_texts_of_a_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hub_texts(spec: str) -> HubTexts:
        asked.append(spec)
        rows = [f"row {i}\nof many in it\n".encode() for i in range(500)]
        return HubTexts([*rows, rows[0], b"", "né".encode(), b"\x00"], "text", False)

    monkeypatch.setattr(nas.tasks.hub, "hub_texts", hub_texts)
    counts = "4 texts left out (1 empty, 1 equal to another, 2 with other characters)"
    assert load_text(SMALL, "hf:some/rows").summary.endswith(counts)
    summary = load_text(replace(SMALL_BPE, vocabulary=270), "hf:some/rows").summary
    assert summary.startswith("501 texts of column text, ")
    assert "3 texts left out (1 binary, 1 empty, 1 equal to another)" in summary
    assert asked == ["hf:some/rows"] * 2
    assert "got hf:some/rows;" in refusal("hf:some/rows", replace(SMALL, context=4000))

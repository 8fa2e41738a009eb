"""The reader of zipped SavedModels on small ones written here byte by byte in TensorFlow's formats."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipfilter.errors import RefusedError
from clipfilter.models.heads import Head, convert
from clipfilter.models.heads import savedmodel as reader

# ---------------------------------------------------------------- a writer


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def proto(*items: tuple[int, Any]) -> bytes:
    """A message: ints as varints, floats as fixed32, texts and bytes length-delimited."""
    out = b""
    for number, value in items:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            out += varint(number << 3 | 5) + struct.pack("<f", value)
        else:
            raw = value.encode() if isinstance(value, str) else value
            out += varint(number << 3 | 2) + varint(len(raw)) + raw
    return out


def shape(*sizes: int) -> bytes:
    return proto(*((2, proto((1, size))) for size in sizes))


def block(entries: list[tuple[bytes, bytes]]) -> bytes:
    """A table block whose keys share prefixes, with its restarts, compression and (unread) checksum."""
    out, before, restarts = b"", b"", []
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % 3:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        else:
            restarts.append(len(out))
        out += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    return out + struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", len(restarts))


def bundle(tensors: dict[str, np.ndarray]) -> tuple[bytes, bytes]:
    """variables.index and variables.data."""
    data, entries = b"", [(b"", proto((1, 1)))]
    for name in sorted(tensors):
        tensor = tensors[name]
        dtype = {np.dtype("f4"): 1, np.dtype("i8"): 9}[tensor.dtype]
        place = ((4, len(data)), (5, tensor.nbytes)) if data else ((5, tensor.nbytes),)
        entries.append((name.encode(), proto((1, dtype), (2, shape(*tensor.shape)), *place, (6, 1.0))))
        data += tensor.tobytes()
    table, handles = b"", []
    for start in range(0, len(entries), 4):  # several data blocks
        part = entries[start : start + 4]
        content = block(part)
        handles.append((part[-1][0] + b"~", varint(len(table)) + varint(len(content))))
        table += content + b"\0" + b"crc."
    places = b""
    for content in (block([]), block(handles)):
        places += varint(len(table)) + varint(len(content))
        table += content + b"\0" + b"crc."
    return table + places.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57), data


def node(name: str, op: str, *inputs: str, **attributes: bytes) -> bytes:
    attrs = [(5, proto((1, key), (2, value))) for key, value in attributes.items()]
    return proto((1, name), (2, op), *((3, item) for item in inputs), *attrs)


def call(name: str, function: str, *inputs: str) -> bytes:
    return node(name, "StatefulPartitionedCall", *inputs, f=proto((10, proto((1, function)))))


def function(name: str, arguments: list[str], *nodes: bytes) -> bytes:
    return proto((1, proto((1, name), *((2, proto((1, item))) for item in arguments))), *((3, item) for item in nodes))


def words(items: list[str]) -> bytes:
    return proto((8, proto((1, 7), (2, shape(len(items))), *((8, item) for item in items))))


def whole(values: list[int], packed: bool = False) -> bytes:
    if packed:
        return proto((8, proto((1, 9), (2, shape(len(values))), (10, b"".join(map(varint, values))))))
    return proto((8, proto((1, 9), (2, shape(len(values))), (4, np.array(values, "<i8").tobytes()))))


def scalar(value: int) -> bytes:
    return proto((8, proto((1, 9), (2, b""), (10, varint(value)))))


def saved_model(vocabularies: dict[int, dict[str, int]], default: int = 0) -> bytes:
    """A graph that looks words up in the way Keras writes it: tables are arguments, filled by calls elsewhere."""
    main, inside, arguments, given = [], [], ["input_1"], ["serving_default_input_1"]
    for number, (position, words_to) in enumerate(vocabularies.items()):
        table = f"StatefulPartitionedCall_{2 * number + 50}"
        keys, values, fallback = f"Const_{3 * number}", f"Const_{3 * number + 1}", f"Const_{3 * number + 2}"
        main += [
            call(table, f"creator_{number}"),
            node(keys, "Const", value=words(list(words_to))),
            node(values, "Const", value=whole(list(words_to.values()), packed=number % 2 == 1)),
            node(fallback, "Const", value=scalar(default)),
            call(f"fill_{number}", f"lambda_{number}", table, keys, values),
        ]
        inside += [
            node(f"m/AsString_{number}", "AsString", f"m/split:output:{position}"),
            node(
                f"m/find_{number}",
                "LookupTableFindV2",
                f"table_{number}",
                f"m/AsString_{number}:output:0",
                f"or_{number}",
            ),
        ]
        arguments += [f"table_{number}", f"or_{number}"]
        given += [table, fallback]
    outer = ["input_1", *(f"unknown_{number}" for number in range(len(arguments) - 1))]
    main.append(call("serve", "__inference_signature_wrapper_2", *given))
    library = proto(
        (1, function("__inference__wrapped_model_1", arguments, *inside)),
        (1, function("__inference_signature_wrapper_2", outer, call("inner", "__inference__wrapped_model_1", *outer))),
    )
    graph = proto(*((1, item) for item in main), (2, library))
    return proto((1, 1), (2, proto((1, b""), (2, graph))))


DIM = 6
RNG = np.random.default_rng(5)
KEY = "layer_with_weights-{}/{}/.ATTRIBUTES/VARIABLE_VALUE"
TENSORS = {
    "_CHECKPOINTABLE_OBJECT_GRAPH": np.zeros(3, "i8"),  # some other type, not read
    KEY.format(1, "mean"): RNG.normal(size=DIM).astype("f2").astype("f4"),
    KEY.format(1, "variance"): np.array([0.5, 2, 0, 1, 0.1, 1.5], "f4"),  # 0: a constant input
    KEY.format(2, "kernel"): RNG.normal(size=(DIM, 5)).astype("f4"),
    KEY.format(2, "bias"): RNG.normal(size=5).astype("f4"),
    KEY.format(10, "kernel"): RNG.normal(size=(5, 1)).astype("f4"),  # after layer 2 by number, before it by text
    KEY.format(10, "bias"): RNG.normal(size=1).astype("f4"),
    "keras_api/metrics/0/total/.ATTRIBUTES/VARIABLE_VALUE": np.float32([4]),
}
# Words as "%f" writes them, negative zero, and words that no number can give.
VOCABULARIES = {
    4: {"-0.500000": 3, "0.250000": 1, "-0.000000": 7, "": 9, "nan": 8, "0.25": 5},
    1: {"0.000000": 2, "0.000001": 4},
}


def archive(path: Path, index: bytes, data: bytes, graph: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("net/variables/variables.index", index)
        file.writestr("net/variables/variables.data-00000-of-00001", data)
        file.writestr("net/saved_model.pb", graph)
    return path


def good(path: Path) -> Path:
    return archive(path, *bundle(TENSORS), saved_model(VOCABULARIES))


# ---------------------------------------------------------------- tests


def by_hand(rows: np.ndarray) -> np.ndarray:
    """The network from its definition, one number at a time."""
    scores = []
    for row in rows:
        x = [float(number) for number in row]
        for position, known in VOCABULARIES.items():
            x[position] = float(known.get(f"{x[position]:f}", 0))
        mean, variance = TENSORS[KEY.format(1, "mean")], TENSORS[KEY.format(1, "variance")]
        x = [(a - float(m)) / max(float(v) ** 0.5, 1e-7) for a, m, v in zip(x, mean, variance, strict=True)]
        kernel, bias = TENSORS[KEY.format(2, "kernel")], TENSORS[KEY.format(2, "bias")]
        hidden = [
            max(0.0, sum(a * float(w) for a, w in zip(x, kernel[:, j], strict=True)) + float(bias[j])) for j in range(5)
        ]
        kernel, bias = TENSORS[KEY.format(10, "kernel")], TENSORS[KEY.format(10, "bias")]
        logit = sum(a * float(w) for a, w in zip(hidden, kernel[:, 0], strict=True)) + float(bias[0])
        scores.append(1 / (1 + np.exp(-logit)))
    return np.array(scores)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_small_classifier_scores_as_its_definition_says(tmp_path: Path, dtype: type) -> None:
    content = convert(good(tmp_path / "net.zip"), "autokeras", "some-model")
    head = Head.of("h", "0" * 64, "some-model", content.network("h"))
    rows = np.random.default_rng(6).normal(size=(200, DIM)).astype(dtype)
    rows[:, 2] = TENSORS[KEY.format(1, "mean")][2]  # else the constant input alone decides
    rows[:80, 4] = np.resize(np.array([-0.5, 0.25, -0.0, 0.0, -1e-7, 0.24], dtype), 80)
    rows[:80, 1] = np.resize(np.array([0.0, 1e-6, -1e-7, 4.9e-7, 5.1e-7], dtype), 80)
    np.testing.assert_allclose(head.scores(rows), by_hand(rows), atol=2e-6)
    assert head.scores(rows).std() > 0.02


def test_words_are_what_percent_f_writes() -> None:
    numbers = np.arange(65536, dtype=np.uint16).view(np.float16)
    numbers = np.concatenate([numbers[np.isfinite(numbers)].astype(np.float64), np.float32(RNG.normal(size=20_000))])
    texts = [b"%f" % number for number in numbers]
    keys, values = reader._vocabulary(texts, np.arange(1, len(texts) + 1))
    from clipfilter.models.heads.network import Vocabulary

    last = {text: number for number, text in enumerate(texts, start=1)}
    np.testing.assert_array_equal(Vocabulary(keys, values.astype(float))(numbers), [last[text] for text in texts])


def test_words_of_float16_are_those_of_the_same_numbers_in_float64() -> None:
    from clipfilter.models.heads.network import NEGATIVE_ZERO, Vocabulary

    keys = np.unique([NEGATIVE_ZERO, 0, *RNG.integers(-(10**6), 10**6, 400_000)])
    vocabulary = Vocabulary(keys, RNG.normal(size=len(keys)))
    numbers = np.arange(65536, dtype=np.uint16).view(np.float16)
    numbers = numbers[np.isfinite(numbers)]
    expected = vocabulary(numbers.astype(np.float64))
    np.testing.assert_array_equal(vocabulary(numbers), expected)
    np.testing.assert_array_equal(vocabulary(np.stack([numbers, -numbers], axis=1)[:, 0]), expected)  # not contiguous
    assert 1000 < np.count_nonzero(expected) < len(expected)


def test_members_that_are_missing_twice_or_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(RefusedError, match="damaged or no AutoKeras classifier") as caught:
            convert(path, "autokeras", "m")
        return str(caught.value)

    path = tmp_path / "net.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("net/saved_model.pb", b"")
    assert "0 members variables/variables.index" in refusal(path)
    good(path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/saved_model.pb", b"")
    assert "2 members saved_model.pb" in refusal(path)
    archive(path, b"x" * 2000, b"", b"")
    monkeypatch.setattr(reader, "MAX_MEMBER_BYTES", 1000)
    assert "larger than" in refusal(path)
    path.write_bytes(good(path).read_bytes()[:-40])
    assert "zip" in refusal(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({KEY.format(2, "kernel"): np.zeros((DIM + 1, 5), "f4")}, "do not fit"),
        ({KEY.format(10, "bias"): np.float32([np.nan])}, "not finite"),
        ({KEY.format(3, "mean"): np.zeros(DIM, "f4")}, "no single standardisation"),
        ({KEY.format(1, "variance"): np.full(DIM, -1, "f4")}, "one output"),
    ],
)
def test_tensors_that_make_no_classifier_are_refused(
    tmp_path: Path, change: dict[str, np.ndarray], message: str
) -> None:
    path = archive(tmp_path / "net.zip", *bundle(TENSORS | change), saved_model(VOCABULARIES))
    with pytest.raises(RefusedError, match=message):
        convert(path, "autokeras", "m")


def test_graphs_that_mean_something_else_are_refused(tmp_path: Path) -> None:
    for graph, message in (
        (saved_model(VOCABULARIES, default=1), "unknown words do not become 0"),
        (saved_model({DIM: {"0.000000": 1}}), "belongs to no input"),
        (saved_model(VOCABULARIES).replace(b"__inference_signature", b"__inference_signaturf"), "0 candidates"),
        (saved_model(VOCABULARIES)[:-10], "ends too early"),
    ):
        with pytest.raises(RefusedError, match=message):
            convert(archive(tmp_path / "net.zip", *bundle(TENSORS), graph), "autokeras", "m")


def test_damage_anywhere_is_refused_in_one_sentence(tmp_path: Path) -> None:
    """Bytes changed or cut inside the members: read as far as it makes sense, or refused; nothing else is raised."""
    rng = np.random.default_rng(11)
    parts = [*bundle(TENSORS), saved_model(VOCABULARIES)]
    sentences = []
    for _ in range(400):
        changed = [bytearray(part) for part in parts]
        victim = changed[rng.integers(0, 3)]
        for _ in range(rng.integers(1, 4)):
            victim[rng.integers(0, len(victim))] = rng.integers(0, 256)
        if rng.random() < 0.2:
            del victim[rng.integers(0, len(victim)) :]
        try:
            convert(archive(tmp_path / "net.zip", *map(bytes, changed)), "autokeras", "m").network("x")
        except RefusedError as error:
            sentences.append(str(error))
    assert 100 < len(sentences) < 400
    assert not [sentence for sentence in sentences if "\n" in sentence or len(sentence) > 600]


def test_damage_of_the_zip_itself_is_refused(tmp_path: Path) -> None:
    raw = good(tmp_path / "net.zip").read_bytes()
    rng = np.random.default_rng(12)
    refused = 0
    for _ in range(150):
        changed = bytearray(raw)
        changed[rng.integers(0, len(raw))] ^= 1 << rng.integers(0, 8)
        (tmp_path / "bad.zip").write_bytes(changed)
        try:
            convert(tmp_path / "bad.zip", "autokeras", "m")
        except RefusedError:
            refused += 1
    assert refused > 50

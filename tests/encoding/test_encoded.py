"""Encoding ahead: what is kept, and that training on it is training on the pictures."""

import dataclasses
import io
import json
import shlex
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sdjax import encode
from sdjax.checkpoints.assemble import assemble
from sdjax.config import default, resolve
from sdjax.config_model import method_of_run
from sdjax.data import encoded, image_files, sources, transforms
from sdjax.data.config import DataError
from sdjax.data.pipeline import make_iterator
from sdjax.data.sources import open_source
from sdjax.data.tfds.tfds_on_cpu import tfds
from sdjax.diffusion.losses import example_keys
from sdjax.encoding import dataset as verb
from sdjax.encoding import encoder
from sdjax.encoding.dataset import Options, check_encoded, encode_dataset
from sdjax.errors import UserError
from sdjax.families.conditioning import encode_text, make_conditioner
from sdjax.families.registry import model_of
from sdjax.methods.method import Draw
from sdjax.train import loop
from tests.families import torch_transformers
from tests.odd_names import ODD
from tests.train.test_loop import assert_same_run

SIZES = [(20, 22), (18, 36), (40, 20)]  # height, width


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name is taken for no pattern, URL or word of a shell."""
    (tmp_path / ODD).mkdir()
    return tmp_path / ODD


class Snaps(tfds.core.GeneratorBasedBuilder):
    """Noisy pictures of three shapes, with two or three captions each and a class."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def _info(self):
        f = tfds.features
        features = f.FeaturesDict(
            {
                "image": f.Image(shape=(None, None, 3)),
                "text": f.Text(),
                "captions": f.Sequence(f.Text()),
                "label": f.ClassLabel(names=["cat", "dog"]),
                "file_name": f.Text(),
            }
        )
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(30), "test": self._generate_examples(4)}

    def _generate_examples(self, count):
        rng = np.random.default_rng(0)
        for i in range(count):
            buffer = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (*SIZES[i % 3], 3), np.uint8)).save(buffer, "PNG")
            others = [f"a red {i}", f"a blue {i}"][: 1 + i % 2]
            yield (
                str(i),
                {
                    "image": io.BytesIO(buffer.getvalue()),
                    "text": f"a circle {i}",
                    "captions": others,
                    "label": i % 2,
                    "file_name": f"{i}.png",
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tfds") / ODD)
    Snaps(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


@pytest.fixture
def snaps(tiny_config, data_dir, pipeline_folder):
    """Pictures and networks to encode them with, none of which is trained here."""
    tiny_config.update(init_from=str(pipeline_folder), vae_from="")
    tiny_config.data.update(name="snaps", data_dir=data_dir, batch_size=6)
    tiny_config.optim.groups = (("^text_encoder", 0.0),)
    return tiny_config


def encoded_once(config, folder, *, host=0, hosts=1, **options):
    options = {"dtype": "float32", "batch": 4, "shard_examples": 8} | options
    return encode_dataset(resolve(config), str(folder), Options(**options), host=host, hosts=hosts)


def on(config, folder, **changes):
    """The configuration, to train on what was encoded."""
    changed = config.copy_and_resolve_references()
    changed.data.update(name="encoded", path=str(folder))
    changed.update_from_flattened_dict(changes)
    return changed


def batches(config, count, **options):
    assembled = assemble(resolve(config))
    data = make_iterator(
        resolve(config).data,
        assembled.tokenizers,
        seed=3,
        number_shapes={"size": (4,)},
        split="train",
        **options,
    )
    with_shape = [(data.next_shape, next(data)) for _ in range(count)]
    data.close()
    return with_shape


def networks(config):
    """images -> moments, captions -> embeddings, by the functions of training."""
    config = resolve(config)
    assembled = assemble(config)
    config = assembled.config
    pictures = encoder.make_vae_encoder(config, assembled.params, 6)
    texts = encoder.make_text_encoder(config, assembled.params, assembled.tokenizers, 6)
    return pictures, texts, assembled.tokenizers


@pytest.fixture
def frozen_text(tiny_config, pipeline_folder):
    """A run on captioned_shapes, all of whose networks are loaded."""
    tiny_config.update(init_from=str(pipeline_folder), vae_from="")
    tiny_config.data.flip = True
    tiny_config.data.captions.swap_sides = False  # which keeps embeddings from being mirrored
    tiny_config.objective.caption_dropout = 0.5
    tiny_config.optim.groups = (("^text_encoder", 0.0),)
    return tiny_config


def losses(config):
    """Of each example of the first two batches: float32 [2, 8]."""
    config = resolve(config)
    assembled = assemble(config)
    method = method_of_run(assembled.config, assembled.tokenizers)
    params = {path: jnp.asarray(assembled.params[path]) for path in method.abstract}

    def loss(batch, start):
        positions = start + jnp.arange(8)
        keys = example_keys(jax.random.key(1), positions)
        draw = Draw(jax.random.key(1), keys, positions, 8)
        return method.phases[0].loss(params, {}, {}, batch, draw)[0]

    # It runs twice: optimisations take longer than they save.
    step = jax.jit(loss, compiler_options={"xla_backend_optimization_level": 0})
    data = make_iterator(assembled.config.data, assembled.tokenizers, seed=0, split="train")
    found = [step(next(data), start) for start in (0, 8)]
    data.close()
    return np.asarray(found)


def test_losses_are_those_of_pictures(frozen_text, tmp_path):
    """Mirrored or not, captions dropped or not, from tokens or embeddings."""
    encoded_once(frozen_text, tmp_path / "data", text=True, flipped=True)
    want = losses(frozen_text)
    assert want.shape == (2, 8) and len(set(want.ravel())) == 16
    for text_embeddings in (False, True):
        ahead = on(frozen_text, tmp_path / "data", **{"data.text_embeddings": text_embeddings})
        # The networks are compiled apart from the step and for other batches; all is float32.
        np.testing.assert_allclose(losses(ahead), want, rtol=2e-5)


def test_a_stream_of_moments_goes_on_where_it_stood(snaps, tmp_path):
    encoded_once(snaps, tmp_path / "data", flipped=True)
    ahead = on(snaps, tmp_path / "data", **{"data.flip": True})
    want = batches(ahead, 7)
    config = resolve(ahead)
    tokenizers = assemble(config).tokenizers
    data = make_iterator(
        config.data, tokenizers, seed=3, number_shapes={"size": (4,)}, split="train"
    )
    data.set_state(json.loads(json.dumps({**data.get_state(), "step": 4})))
    for _, batch in want[4:]:
        jax.tree.map(np.testing.assert_array_equal, next(data), batch)
    data.close()


@pytest.mark.slow  # the stream above and the runs of test_loop say the same in two parts
def test_a_run_on_moments_resumes_to_the_bit(tiny_config, tmp_path):
    config = tiny_config
    config.optim.schedule = "constant"  # so that the length of a run changes nothing else
    report = encoded_once(config, tmp_path / "data")
    assert report.examples == {"train": 40, "test": 8}
    ahead = on(config, tmp_path / "data", **{"train.export": True})
    ahead.train.update(steps=4, checkpoint_every=2)
    assert loop.run(resolve(ahead), str(tmp_path / "whole")) == loop.DONE
    assert (tmp_path / "whole" / "diffusers" / "vae" / "config.json").exists()
    ahead.train.update(steps=2, export=False)
    assert loop.run(resolve(ahead), str(tmp_path / "parts")) == loop.DONE
    ahead.train.steps = 4
    assert loop.run(resolve(ahead), str(tmp_path / "parts")) == loop.DONE
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_sdxl_is_told_the_same(snaps, xl_folder, tmp_path):
    """Both encoders' states, the pooled caption, sizes and corners; dropped captions too."""
    snaps.init_from = str(xl_folder)
    snaps.data.update(flip=True, crop="random")
    encoded_once(snaps, tmp_path / "data", text=True, flipped=True)
    ahead = on(snaps, tmp_path / "data", **{"data.text_embeddings": True})
    assembled = assemble(resolve(ahead))
    params = assembled.params
    conditioner = make_conditioner(model_of(assembled.config.model), assembled.tokenizers)
    data = make_iterator(
        assembled.config.data, assembled.tokenizers, seed=3, number_shapes={"size": (4,)},
        split="train", shuffle=False,
    )  # fmt: skip
    batch = next(data)
    data.close()
    texts = [source_of(ahead, "train").text(i) for i in range(6)]
    assert batch["context"].shape == (6, 16, 56) and batch["pooled"].shape == (6, 20)
    tokens = encode_text(assembled.tokenizers, texts)
    keys = example_keys(jax.random.key(1), jnp.arange(6))
    made = []
    for text in (tokens, {name: batch[name] for name in ("context", "pooled")}):
        kept = {**text, "size": batch["size"]}
        kept |= conditioner.drop(params, kept, keys, 0.5)
        made.append(conditioner(params, kept, target=(16, 16)))
    assert not np.all(made[0]["pooled"], axis=1).all()  # some are dropped
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *made)
    assert jax.tree.map(lambda x: x.shape, conditioner.embedding()) == {
        "context": (16, 56), "pooled": (20,)
    }  # fmt: skip


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_features_of_t5_are_those_of_tokens_and_belong_to_their_length(
    snaps, torch_pipeline, family, tmp_path
):
    folder = tmp_path / "model"
    make = getattr(torch_transformers, family)
    make(torch_pipeline.tokenizer, tmp_path / "t5").save_pretrained(folder)
    snaps.init_from = str(folder)
    snaps.model = default(family=family).model.to_dict()
    snaps.model.max_sequence_length = 6
    encoded_once(snaps, tmp_path / "data", text=True)
    ahead = on(snaps, tmp_path / "data", **{"data.text_embeddings": True})
    assembled = assemble(resolve(ahead))
    conditioner = make_conditioner(model_of(assembled.config.model), assembled.tokenizers)
    data = make_iterator(assembled.config.data, assembled.tokenizers, seed=3, split="train",
                         shuffle=False)  # fmt: skip
    batch = next(data)
    data.close()
    texts = [source_of(ahead, "train").text(i) for i in range(6)]
    tokens = encode_text(assembled.tokenizers, texts)
    made = [
        conditioner(assembled.params, text, target=(16, 16))
        for text in (tokens, {name: batch[name] for name in ("context", "pooled")})
    ]
    assert made[0]["context"].shape == (6, 6 + (16 if family == "sd3" else 0), 24)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *made)

    check_encoded(assembled.config, assembled, ())
    ahead.model.max_sequence_length = 8
    longer = assemble(resolve(ahead))
    with pytest.raises(UserError, match="text_encoder"):
        check_encoded(longer.config, longer, ())


@pytest.mark.parametrize("flip", [False, True])
def test_batches_of_buckets_are_those_of_the_pictures(snaps, tmp_path, flip):
    """Moments of the same crops, original sizes and corners, embeddings of the same captions."""
    snaps.data.captions.others_key = "captions"
    snaps.data.buckets.update(step=4, max_aspect=2.0)
    snaps.data.flip = flip
    encoded_once(snaps, tmp_path / "data", text=True, flipped=flip)
    ahead = on(snaps, tmp_path / "data", **{"data.text_embeddings": True})
    pictures, texts, tokenizers = networks(snaps)
    shapes = set()
    names = [f"{a} {i}" for i in range(30) for a in ("a circle", "a red", "a blue")]
    by_tokens = {tokenizers["tokens"].encode([name])[0].tobytes(): name for name in names}
    for (shape, there), (same, here) in zip(batches(snaps, 10), batches(ahead, 10), strict=True):
        assert shape == same and there.keys() == {"image", "tokens", "size"}
        assert here.keys() == {"moments", "context", "size"}
        np.testing.assert_array_equal(here["size"], there["size"])
        np.testing.assert_allclose(here["moments"], pictures(there["image"]), atol=1e-5)
        captions = [by_tokens[row.tobytes()] for row in there["tokens"]]
        np.testing.assert_allclose(here["context"], texts(captions)["context"], atol=1e-5)
        shapes.add(shape)
    assert len(shapes) == 3


def test_a_bucket_smaller_than_a_batch_keeps_its_shape(snaps, tmp_path):
    """Pictures of a closed bucket move to another when they are cropped, and not afterwards."""
    snaps.data.buckets.update(step=4, max_aspect=2.0)
    encoded_once(snaps, tmp_path / "data")
    ahead = on(snaps, tmp_path / "data", **{"data.batch_size": 12})
    used = []
    for (height, width), batch in batches(ahead, 15):
        assert batch["moments"].shape[1:3] == (height // 2, width // 2)
        used += [tuple(row) for row in batch["size"][:, :2]]
    # Fifteen batches of twelve are six epochs of thirty.
    assert {size: used.count(size) for size in SIZES} == dict.fromkeys(SIZES, 60)


def test_templates_of_labels_are_chosen_from_as_before(snaps, tmp_path):
    snaps.data.update(text_key="label")
    snaps.data.captions.templates = ("one {}", "my {}")
    encoded_once(snaps, tmp_path / "data")
    ahead = on(snaps, tmp_path / "data")
    seen = set()
    for (_, there), (_, here) in zip(batches(snaps, 5), batches(ahead, 5), strict=True):
        np.testing.assert_array_equal(here["tokens"], there["tokens"])
        seen |= {row.tobytes() for row in here["tokens"]}
    assert len(seen) == 6


def test_splits_by_hash_are_cut_once(snaps, tmp_path):
    snaps.data.validation_share = 0.3
    report = encoded_once(snaps, tmp_path / "cut", splits=("train", "validation"))
    assert sum(report.examples.values()) == 30 and report.examples["validation"] > 3
    whole = encoded_once(snaps, tmp_path / "again", splits=("validation",))
    assert whole.examples["validation"] == report.examples["validation"]
    assert len(batches(on(snaps, tmp_path / "cut"), 1)[0][1]["tokens"]) == 6
    found = source_of(on(snaps, tmp_path / "cut"), "train")
    assert len(found) == report.examples["train"]

    # Encoded whole, it is cut by those who train on it, in the same places.
    snaps.data.validation_share = 0.0
    encoded_once(snaps, tmp_path / "whole")
    snaps.data.validation_share = 0.3
    for split in ("train", "validation"):
        a, b = (source_of(on(snaps, tmp_path / n), split) for n in ("cut", "whole"))
        assert [a.text(i) for i in range(len(a))] == [b.text(i) for i in range(len(b))]


def source_of(config, split):
    return open_source(resolve(config).data, split)


def files(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir()}


def test_killed_half_way_it_ends_with_the_same_bytes(snaps, tmp_path, monkeypatch):
    encoded_once(snaps, tmp_path / "whole")
    write, left = verb.write_records, [2]

    def dying(*args):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(*args)

    monkeypatch.setattr(verb, "write_records", dying)
    with pytest.raises(KeyboardInterrupt):
        encoded_once(snaps, tmp_path / "broken")
    with pytest.raises(DataError, match=r"encoding\.json"):
        encoded.read(tmp_path / "broken")
    left[0] = 3  # of the five
    encoded_once(snaps, tmp_path / "broken")
    assert files(tmp_path / "whole") == files(tmp_path / "broken")
    with pytest.raises(UserError, match="begun with other settings.*dtype"):
        encoded_once(snaps, tmp_path / "broken", dtype="bfloat16")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        encoded_once(snaps, tmp_path / "other")


def test_hosts_share_the_shards_and_need_no_connection(snaps, tmp_path, monkeypatch):
    encoded_once(snaps, tmp_path / "one")
    assert encoded_once(snaps, tmp_path / "two", host=1, hosts=2) is None
    some = {f.name for f in (tmp_path / "two").glob("*-of-*") if f.suffix != ".json"}
    assert 0 < len(some) < 5
    assert encoded_once(snaps, tmp_path / "two", host=0, hosts=2).examples["train"] == 30
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr(verb, "WAIT", 0.0)  # seconds
    with pytest.raises(UserError, match="2 of 4 shards of train are not there.*on all hosts"):
        encoded_once(snaps, tmp_path / "alone", host=0, hosts=2)


def test_what_cannot_be_encoded_is_counted_and_named(snaps, tmp_path, monkeypatch):
    """Also where it is all of a shard."""
    make = verb.make_vae_encoder

    bad = np.zeros(34, bool)
    bad[[3, 9]] = True
    bad[16:24] = True  # the third shard
    turn = iter(bad)

    def one_by_one(config, params, batch):
        run = make(config, params, batch)
        return lambda images: run(images) * (np.nan if next(turn) else 1)

    monkeypatch.setattr(verb, "make_vae_encoder", one_by_one)
    report = encoded_once(snaps, tmp_path / "data", batch=1)
    source = source_of(snaps, "train")
    names = [source.key(i) for i in np.flatnonzero(bad)]
    assert report.dropped == {"train": {"NaN or Inf in moments": names}, "test": {}}
    assert report.examples == {"train": 20, "test": 4}
    assert json.loads((tmp_path / "data" / "encoding.json").read_text())["dropped"] == (
        report.dropped
    )
    kept = source_of(on(snaps, tmp_path / "data"), "train")
    assert [kept.key(i) for i in range(20)] == [source.key(i) for i in range(30) if not bad[i]]


def test_an_unreadable_picture_is_counted_and_what_is_forbidden_stops_it(
    snaps, tmp_path, monkeypatch
):
    decode, error = transforms.decode_image, image_files.ImageError("truncated", "ends early")

    def failing(data, **options):
        image = decode(data, **options)
        if image.size == SIZES[1][::-1]:
            raise error
        return image

    monkeypatch.setattr(transforms, "decode_image", failing)
    report = encoded_once(snaps, tmp_path / "data")
    assert report.examples["train"] == 20
    assert len(report.dropped["train"]["cannot be read"]) == 10

    def forbidden(self, index):  # as data.captions.empty = "error" says it
        raise DataError("has no caption")

    monkeypatch.setattr(sources.Source, "example", forbidden)
    with pytest.raises(DataError, match="has no caption"):
        encoded_once(snaps, tmp_path / "again")


REFUSED = {
    "data.resolution": (8, "data.resolution is 8, encoded was 16"),
    "data.crop": ("random", "data.crop is 'random'"),
    "data.flip": (True, "no mirrored pictures"),
    "data.buckets.step": (4, "data.buckets is"),
    "data.validation_share": (0.2, "data.validation_share is 0.2"),
    "vae_from": ("tiny", "the vae is"),
    "method": ({"name": "autoencoder"}, "trains on pictures"),
    "optim.groups": ((), "a text encoder is trained"),
}


def test_what_it_was_not_encoded_for_is_refused(snaps, tmp_path):
    snaps.data.validation_share = 0.1
    encoded_once(snaps, tmp_path / "data", text=True)
    snaps.data.text_embeddings = True

    def check(config):
        config = resolve(config)
        assembled = assemble(config)
        trained = [] if config.optim.groups else ["text_encoder.x"]
        check_encoded(assembled.config, assembled, trained)

    check(on(snaps, tmp_path / "data"))
    for field, (value, words) in REFUSED.items():
        with pytest.raises(UserError) as error:
            check(on(snaps, tmp_path / "data", **{field: value}))
        assert words in str(error.value), field
    # Another text encoder is refused only where its embeddings are used.
    other = on(snaps, tmp_path / "data")
    config = resolve(other)
    assembled = assemble(config)
    encoder = dataclasses.replace(assembled.config.model.text_encoder, hidden_act="gelu")
    model = dataclasses.replace(assembled.config.model, text_encoder=encoder)
    assembled = dataclasses.replace(
        assembled, config=dataclasses.replace(assembled.config, model=model)
    )
    with pytest.raises(DataError, match="the text_encoder is"):
        check_encoded(assembled.config, assembled, [])
    data = dataclasses.replace(assembled.config.data, text_embeddings=False)
    check_encoded(dataclasses.replace(assembled.config, data=data), assembled, [])


@pytest.fixture
def run_verb(capsys, monkeypatch):
    """A function arguments -> exit code, output."""

    def run(*args):
        argv = ["sdjax.prepare", "--encode", *args]
        monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
        encode.FLAGS.unparse_flags()
        for name in encode.FLAGS:
            encode.FLAGS[name].unparse()
        return encode.main(argv), "".join(capsys.readouterr())

    return run


@pytest.mark.parametrize(
    "args, words",
    [
        (["--output=OUT"], "--config is missing"),
        (["--config=configs/base.py"], "--output is missing"),
        (["--config=nowhere.py", "--output=OUT"], "nowhere.py"),
        (["--config=configs/base.py", "--output=OUT", "--host=2"], "--host is 2"),
        (["--config=configs/base.py", "--output=OUT", "--batch=0"], "--batch is 0"),
        (["--config=configs/base.py", "--output=OUT", "--encode_dtype=int8"], "int8"),
        (["--config=configs/base.py", "--output=OUT", "--splits=train[:5]"], "train[:5]"),
        (["--config=configs/base.py", "--output=OUT", "--encode_text"], "text_encoder_from"),
        (["--config=configs/base.py", "--output=OUT", "stray"], "stray"),
        (
            ["--config=configs/base.py", "--output=OUT", "--max_sequence_length=9"],
            "model.family is 'sd', whose text encoders say",
        ),
        (
            ["--config=configs/flux_tiny.py", "--output=OUT", "--max_sequence_length=1"],
            "model.max_sequence_length = 1: expected 2 to 4096",
        ),
    ],
)
def test_mistakes_of_the_command_line(args, words, run_verb, tmp_path):
    code, out = run_verb(*[arg.replace("OUT", str(tmp_path / "out")) for arg in args])
    assert code == 2 and words in out, out
    assert not (tmp_path / "out").exists()


def test_the_verb(snaps, tmp_path, run_verb):
    recipe, folder = tmp_path / "recipe.py", tmp_path / "out"
    recipe.write_text(
        "from sdjax.config import default\n\n\ndef get_config():\n    c = default()\n"
        f"    c.data.name, c.data.data_dir = 'snaps', {snaps.data.data_dir!r}\n"
        f"    c.init_from, c.vae_from = {snaps.init_from!r}, ''\n"
        "    return c\n"
    )
    code, out = run_verb(
        f"--config={recipe}", f"--output={folder}", "--config.data.resolution=16",
        "--splits=test", "--encode_text",
    )  # fmt: skip
    assert code == 0 and "test: 4 examples encoded" in out, out
    (line,) = [line for line in out.splitlines() if line.startswith("to train on them")]
    words = shlex.split(line)
    assert words[-2:] == [f"--config.data.path={folder}", "--config.data.text_embeddings=True"]
    assert encoded.read(folder).dtype == "bfloat16"


def test_length_of_text_is_that_of_the_run_to_come(run_verb, monkeypatch, tmp_path):
    seen = []

    def encode_dataset(config, *args, **options):
        seen.append(config.model.max_sequence_length)
        return verb.Report({}, {})

    monkeypatch.setattr(verb, "encode_dataset", encode_dataset)
    code, out = run_verb(
        "--config=configs/flux_tiny.py", f"--output={tmp_path / 'out'}", "--encode_text",
        "--max_sequence_length=33",
    )  # fmt: skip
    assert code == 0 and seen == [33]
    assert "--config.model.max_sequence_length=33" in out


def test_bfloat16_halves_the_file_and_rounds_once():
    rng = np.random.default_rng(0)
    array = rng.normal(size=(4, 4, 8)).astype(np.float32)
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        data = encoded.pack(array, dtype)
        assert len(data) == array.size * size
        back = encoded.unpack(data, array.shape, dtype).astype(np.float32)
        want = array if size == 4 else np.asarray(jax.numpy.asarray(array, "bfloat16"), np.float32)
        np.testing.assert_array_equal(back, want)


def test_every_example_of_a_shard_counts_as_progress(monkeypatch):
    monkeypatch.setattr(
        encoder, "_encode_some", lambda job, some, shape, dropped: {index: {} for index in some}
    )
    shapes = [(8, 8), None, (8, 16), (8, 8), (8, 8)]
    source = types.SimpleNamespace(key=str)
    job = encoder.Job(source, shapes, None, 2, None, None, None)
    counts = []
    assert len(encoder.encode_shard(job, range(5), {}, done=counts.append)) == 4
    assert sum(counts) == 5 and len(counts) == 4

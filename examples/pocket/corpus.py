"""Collect, clean and split the English text that the pocket model reads.

    python examples/pocket/corpus.py --work /tmp/pocket --math ../shared/data/math

Needs Debian's ``apt-get`` and ``dpkg``; packages are unpacked below ``--work`` and never
installed. Writes ``train.jsonl``, ``valid.jsonl`` (about one document in a hundred) and
``sources.json`` there. None of the text belongs in the repository.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import struct
import subprocess
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

SEED = 20
DOCUMENT_CHARS = 5000
END, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"

Paragraphs = Iterable[str]
Document = str


@dataclass(frozen=True)
class Source:
    """One Debian package: where its text lies, how to read it, its licence and a size limit."""

    package: str
    files: str
    read: Callable[[Path], Iterator[Document]]
    licence: str
    limit_mb: float = 99.0


# ---------------------------------------------------------------- cleaning

FOLD = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "…": "...", "\u00a0": " "})
REPORT = re.compile(
    r"(?i)\b(findings|impression|comparison|technique|indication)\s*:|\bradiograph(s|ic)? of\b"
)
COMMON = frozenset(
    re.findall(
        r"\w+",
        "the of and to in a is that for it as with be by on or this are not his was an from",
    )
)


def tidy(text: str) -> str:
    """Fold typographic characters to ASCII ones and collapse white space."""
    text = re.sub(r"\s*[—–]\s*", " -- ", text.translate(FOLD))
    text = unicodedata.normalize("NFKC", text)
    return re.sub(r"\s+", " ", text).strip()


def is_prose(text: str, words: int = 8) -> bool:
    """Whether a paragraph is a run of English sentences and no table, code or report."""
    tokens = re.findall(r"[A-Za-z']+", text)
    if len(tokens) < words or not text.isascii() or not re.match(r"[\"'(A-Z_]", text):
        return False
    letters = sum(c.isalpha() or c == " " for c in text) / len(text)
    common = sum(t.lower() in COMMON for t in tokens) / len(tokens)
    return letters > 0.88 and common > 0.12 and text[-1] in ".!?:;\"')" and not REPORT.search(text)


def pack(paragraphs: Paragraphs, joint: str = "\n\n") -> Iterator[Document]:
    """Join neighbouring paragraphs into documents of about DOCUMENT_CHARS characters."""
    held: list[str] = []
    size = 0
    for paragraph in paragraphs:
        held.append(paragraph)
        size += len(paragraph)
        if size > DOCUMENT_CHARS:
            yield joint.join(held)
            held, size = [], 0
    if held:
        yield joint.join(held)


def prose(blocks: Paragraphs, words: int = 8) -> Iterator[str]:
    """The blocks that survive :func:`is_prose`, tidied."""
    return (clean for clean in map(tidy, blocks) if is_prose(clean, words))


# ---------------------------------------------------------------- readers, one per file format


def text_of(path: Path) -> str:
    """A file's text, unzipped where it is zipped."""
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix in {".gz", ".dz"} else data
    return data.decode("utf-8", "replace")


class Blocks(HTMLParser):
    """Collects the text of paragraphs, definitions and list items of an HTML page."""

    KEEP = frozenset({"p", "dd", "li"})
    DROP = frozenset({"pre", "table", "script", "style", "nav", "head"})

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[str] = []
        self.depth = 0
        self.open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Start a block, or a part to leave out."""
        self.depth += tag in self.DROP
        if tag in self.KEEP:
            self.blocks.append("")
            self.open = True

    def handle_endtag(self, tag: str) -> None:
        """End the block or the part left out."""
        self.depth -= tag in self.DROP
        if tag in self.KEEP:
            self.open = False

    def handle_data(self, data: str) -> None:
        """Add text to the open block."""
        if self.open and self.depth <= 0:
            self.blocks[-1] += data


def read_html(path: Path) -> Iterator[Document]:
    """Documentation pages."""
    parser = Blocks()
    parser.feed(re.sub(r'<div class="(simple)?para">', "<p>", text_of(path).replace("¶", "")))
    return pack(prose(parser.blocks))


def read_plain(path: Path) -> Iterator[Document]:
    """Plain text whose paragraphs are set apart by blank lines."""
    return pack(prose(re.split(r"\n\s*\n", text_of(path))))


def read_pod(path: Path) -> Iterator[Document]:
    """Perl's documentation: ordinary paragraphs, formatting codes removed."""
    blocks = [b for b in text_of(path).split("\n\n") if not re.match(r"[\s=]", b)]
    for _ in range(2):
        blocks = [re.sub(r"[BCEFILSX]<+\s*([^<>|]*\|)?([^<>]*?)\s*>+", r"\2", b) for b in blocks]
    return pack(prose(blocks))


def read_sword(path: Path) -> Iterator[Document]:
    """A SWORD commentary: zlib blocks listed in an index of (offset, size, length)."""
    packed = path.with_suffix(path.suffix[:2] + "zz").read_bytes()
    for offset, size, _ in struct.iter_unpack("<III", path.read_bytes()):
        if size:
            page = zlib.decompress(packed[offset : offset + size]).decode("utf-8", "replace")
            page = re.sub(r"<reference[^>]*>|<title.*?</title>", "", page)
            blocks = re.split(r'<div[^>]*type="x-p"[^>]*>|<verse[^>]*>|<lb[^>]*>', page)
            yield from pack(prose(re.sub(r"<[^>]*>", "", b) for b in blocks))


def r_strings(data: bytes) -> Iterator[str]:
    """The first character vector in a serialised R object."""
    at = data.index(b"\0\0\0\x10") + 4
    count = int.from_bytes(data[at : at + 4], "big")
    at += 4
    for _ in range(count):
        size = max(int.from_bytes(data[at + 4 : at + 8], "big", signed=True), 0)
        yield data[at + 8 : at + 8 + size].decode("utf-8", "replace")
        at += 8 + size


def read_r(path: Path) -> Iterator[Document]:
    """An R package's data: novels, as vectors of lines."""
    rest = path.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        book = "\n".join(r_strings(stream.decompress(rest[4:])))
        rest = stream.unused_data
        yield from pack(prose(re.split(r"\n\s*\n", book), words=4))


def read_bible(path: Path) -> Iterator[Document]:
    """The King James Bible, through the reader that Debian ships beside it."""
    reader = path.parents[3] / "bible-kjv/usr/bin/bible"
    whole = [str(reader), "-f", "-l0", f"-p{path.parent}", "gen1:1-rev22:21"]
    lines = subprocess.run(whole, capture_output=True, text=True, check=True).stdout.splitlines()
    chapters: dict[str, list[str]] = {}
    for line in lines:
        if verse := re.match(r"(\w+?\d+):\d+ (.*)", line):
            chapters.setdefault(verse[1], []).append(verse[2])
    for verses in chapters.values():
        yield "\n\n".join(" ".join(verses[i : i + 4]) for i in range(0, len(verses), 4))


def read_webster(path: Path) -> Iterator[Document]:
    """The GCIDE dictionary: headword, part of speech, senses without marks and citations."""
    entries = re.split(r"\n(?=\S)", text_of(path))
    return pack(shuffled(filter(None, map(webster_entry, entries))), "\n")


def webster_entry(entry: str) -> str:
    """One GCIDE entry in one line, or nothing where it holds no definition."""
    entry = re.sub(r"\[[^\[\]]*\]", "", entry)
    entry = re.sub(r"\\[^\\]*\\", "", entry)
    entry = re.sub(r"--\s?(?:[A-Z][\w']*\.?\s*(?:\([^)]*\))?\s*)+", "", entry)
    entry = tidy(re.sub(r"[{}]", "", entry))
    entry = re.sub(r"\s+([,;.])", r"\1", entry)
    return entry if is_prose(entry) and len(entry) < 1500 else ""


def read_wordnet(path: Path) -> Iterator[Document]:
    """WordNet's glosses and examples, each once; some as a question and its answer."""
    entries = re.split(r"\n(?=\S)", text_of(path))
    return pack(shuffled(wordnet_lines(entries)), "\n")


def wordnet_lines(entries: Iterable[str]) -> Iterator[str]:
    """One line per sense: the word, its part of speech, the gloss."""
    names = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}
    seen: set[str] = set()
    for entry in entries:
        word, _, body = entry.partition("\n")
        kind = "noun"
        for sense in re.split(r"\n\s+(?=(?:n |v |adj |adv )?\d+: )", "\n" + body):
            if found := re.match(r"(?:(n|v|adj|adv) )?\d+: (.*)", sense, re.S):
                kind = names.get(found[1], kind)
                gloss = tidy(re.sub(r"\[(syn|ant|also):.*?\]", "", found[2], flags=re.S))
                fresh = gloss not in seen and not REPORT.search(gloss)
                seen.add(gloss)
                if fresh and gloss.isascii() and len(gloss.split()) > 4:
                    yield f"{word.strip()} ({kind}): {gloss}."


def read_foldoc(path: Path) -> Iterator[Document]:
    """The Free On-line Dictionary of Computing: paragraphs of its articles."""
    text = re.sub(r"<[^<>]*>|\[[^\]]*\]|\{\(.*?\)\}|[{}]", "", text_of(path))
    return pack(prose(re.split(r"\n\s*\n", text)))


def shuffled(lines: Iterable[str]) -> list[str]:
    """Lines in a repeatable random order, duplicates removed."""
    unique = list(dict.fromkeys(lines))
    random.Random(SEED).shuffle(unique)
    return unique


SOURCES = [
    Source("bible-kjv-text", "usr/lib/bible.data", read_bible, "public domain"),
    Source("r-cran-janeaustenr", "**/data/Rdata.rdb", read_r, "public domain (package: MIT)"),
    Source("sword-comm-tdavid", "**/*.czs", read_sword, "public domain", 5),
    Source("sword-comm-mhcc", "**/*.bzs", read_sword, "public domain", 3),
    Source("sword-comm-scofield", "**/*.bzs", read_sword, "public domain"),
    Source("dict-gcide", "**/*.dict.dz", read_webster, "GPL-2+ over public domain", 9),
    Source("dict-wn", "**/*.dict.dz", read_wordnet, "WordNet 3.0 (permissive)", 6),
    Source("dict-foldoc", "**/*.dict.dz", read_foldoc, "GFDL-1.2+"),
    Source("dict-devil", "**/*.dict.dz", read_plain, "public domain"),
    Source("jargon-text", "**/*.txt.gz", read_plain, "public domain"),
    Source("python3.11-doc", "usr/share/doc/python3.11/html/**/*.html", read_html, "PSF-2.0"),
    Source("postgresql-doc-15", "**/html/*.html", read_html, "PostgreSQL"),
    Source("apache2-doc", "**/manual/en/**/*.html", read_html, "Apache-2.0"),
    Source("git-doc", "**/*.html", read_html, "GPL-2"),
    Source("perl-doc", "**/*.pod", read_pod, "Artistic or GPL-1+"),
    Source("bash-doc", "**/bashref.html", read_html, "GFDL-1.3+"),
    Source("gimp-help-en", "**/help/en/*.html", read_html, "GFDL-1.2+"),
    Source("debian-handbook", "**/en-US/*.html", read_html, "CC-BY-SA-3.0 or GPL-2+"),
    Source("debian-history", "**/*.en.html", read_html, "GPL-2+"),
    Source("debian-policy", "**/*.html", read_html, "GPL-2+"),
    Source("developers-reference", "usr/share/developers-reference/*.html", read_html, "GPL-2+"),
    Source("debian-reference-en", "**/*.en.html", read_html, "GPL-2+"),
    Source("debian-faq", "**/*.en.html", read_html, "copies under the same notice"),
    Source("debian-kernel-handbook", "**/*.html", read_html, "GPL-2+"),
    Source("harden-doc", "**/en-US/*.html", read_html, "GPL-2+"),
    Source("maint-guide", "**/*.en.html", read_html, "GPL-2+"),
]


# ---------------------------------------------------------------- arithmetic, plain and as a chat


def read_math(path: Path) -> Iterator[Document]:
    """GSM8K's training problems, half of them as a chat so that its marks are learnt."""
    rng = random.Random(SEED)
    for row in map(json.loads, path.read_bytes().splitlines()):
        steps = re.sub(r"<<[^>]*>>", "", row["answer"]).replace("####", "The answer is")
        answer = "\n".join(tidy(step) for step in steps.split("\n"))
        if rng.random() < 0.5:
            yield f"{USER}\n{tidy(row['question'])}\n{ASSISTANT}\n{answer}."
        else:
            yield f"Question: {tidy(row['question'])}\nAnswer: {answer}."


def ask_meanings(lines: list[str], count: int) -> Iterator[Document]:
    """Dictionary lines as short chats."""
    forms = ["What does {} mean?", "Define {}.", "What is the meaning of the word {}?"]
    rng = random.Random(SEED)
    for line in rng.sample(lines, min(count, len(lines))):
        word, _, gloss = line.partition(": ")
        yield f"{USER}\n{rng.choice(forms).format(word.split(' (')[0])}\n{ASSISTANT}\n{gloss}"


# ---------------------------------------------------------------- assembly


def unpack(packages: Iterable[str], work: Path) -> Path:
    """Download and unpack Debian packages below ``work`` without installing them."""
    debs, tree = work / "deb", work / "x"
    debs.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (tree / package).exists():
            subprocess.run(["apt-get", "download", "-q", package], cwd=debs, check=True)
            (deb,) = debs.glob(f"{package}_*.deb")
            subprocess.run(["dpkg", "-x", str(deb), str(tree / package)], check=True)
    return tree


def read_source(source: Source, tree: Path) -> list[Document]:
    """A source's documents, repeatably sampled down to its limit."""
    files = sorted(path for path in (tree / source.package).glob(source.files) if path.is_file())
    documents = [document for path in files for document in source.read(path)]
    random.Random(SEED).shuffle(documents)
    kept, size = [], 0
    for document in documents:
        if size < source.limit_mb * 1e6:
            kept.append(document)
            size += len(document)
    return kept


def without_repeats(document: Document, seen: set[bytes]) -> Document:
    """The document less the paragraphs that an earlier one already held."""
    kept = []
    for paragraph in document.split("\n\n"):
        key = hashlib.blake2b(paragraph.encode(), digest_size=8).digest()
        if key not in seen:
            seen.add(key)
            kept.append(paragraph)
    return "\n\n".join(kept)


def collect(work: Path, math: Path) -> Iterator[tuple[str, Document]]:
    """All documents with the name of their source, repeated paragraphs removed."""
    tree = unpack([s.package for s in SOURCES] + ["bible-kjv"], work)
    seen: set[bytes] = set()
    for source in SOURCES:
        for document in read_source(source, tree):
            if unique := without_repeats(document, seen):
                yield source.package, unique
                if source.package == "dict-wn" and not held_out(unique):
                    yield from (("dict-wn", d) for d in ask_meanings(unique.split("\n"), 6))
    yield from (("gsm8k", document) for document in read_math(math / "gsm8k_train.jsonl"))


def held_out(document: Document) -> bool:
    """Whether a document belongs to the one in a hundred never trained on."""
    return hashlib.blake2b(document.encode(), digest_size=4).digest()[0] * 100 < 256


def main() -> None:
    """Write the two splits and a table of the sources."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--math", type=Path, required=True)
    args = parser.parse_args()
    licences = {s.package: s.licence for s in SOURCES} | {"gsm8k": "MIT"}
    count, size = Counter[str](), Counter[str]()
    with (args.work / "train.jsonl").open("w") as train, (args.work / "valid.jsonl").open("w") as v:
        for name, document in collect(args.work, args.math):
            count[name] += 1
            size[name] += len(document.encode())
            row = json.dumps({"source": name, "text": document})
            (v if held_out(document) else train).write(row + "\n")
    table = [
        {"source": n, "licence": licences[n], "documents": count[n], "bytes": size[n]}
        for n in count
    ]
    (args.work / "sources.json").write_text(json.dumps(table, indent=1) + "\n")
    for row in table:
        print(f"{row['source']:24} {row['documents']:7} {row['bytes'] / 1e6:7.2f} MB")
    print(f"{'all':24} {sum(count.values()):7} {sum(size.values()) / 1e6:7.2f} MB")


if __name__ == "__main__":
    main()

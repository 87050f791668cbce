"""What a prepared directory holds, in words: the text behind ``inspect-data``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ultramem_ds.data.account import Account
from ultramem_ds.data.indexed import IndexedDataset
from ultramem_ds.data.manifest import Manifest, load_manifest, prefix_of
from ultramem_ds.data.mixture import default_weights
from ultramem_ds.data.permutation import Permutation
from ultramem_ds.data.same_tokenizer import data_tokenizer
from ultramem_ds.data.tokenizers import load_tokenizer
from ultramem_ds.data.units import Split


def describe_duplicates(manifest: Manifest) -> list[str]:
    """Exact duplicates, and texts that training shares with held-out corpora."""
    report = manifest.duplicates
    if not report:  # adopted files: nothing is known of their text
        return ["duplicates were not looked for"]
    lines = [f"{report['duplicates']:,} exact duplicates, {report['dropped']:,} of them dropped"]
    lines += [
        f"  {shared['texts']:,} texts occur in {' and '.join(shared['groups'])}"
        for shared in report["shared"]
    ]
    leaks = report["texts_in_train_and_validation"]
    if leaks and not report["dropped"]:
        lines.append(
            f"  warning: {leaks:,} texts are in training and in a held-out corpus; "
            "--drop-duplicates removes them from training"
        )
    return lines


def describe(data_dir: str | Path) -> list[str]:
    """Counts, tokenizer and proportions of a prepared directory.

    Raises:
        ValueError: if the directory is not (completely) prepared.
    """
    manifest = load_manifest(data_dir)
    tokenizer = manifest.tokenizer
    end = data_tokenizer(data_dir).end_of_text
    lines = [
        f"tokenizer   {tokenizer.file}, {tokenizer.vocab_size:,} entries, sha256 "
        f"{tokenizer.hash[:16]}",
        f"end of text {end.token!r}, id {tokenizer.eos_id}"
        + (f", as {end.source} says" if end.source else ""),
        f"{'split':11} {'subset':16} {'documents':>13} {'tokens':>17} {'bytes/token':>11} "
        f"{'of tokens':>9} {'weight':>7}",
    ]
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        infos = manifest.of_split(split)
        total = sum(info.tokens for info in infos.values())
        weights = default_weights(manifest) if split == "train" else {}
        scale = sum(weights.values())
        for name, info in infos.items():
            weight = f"{weights[name] / scale:7.2%}" if name in weights else f"{'':7}"
            lines.append(
                f"{split:11} {name:16} {info.documents:13,} {info.tokens:17,} "
                f"{info.bytes_per_token:11.3f} {info.tokens / total:9.2%} {weight}"
            )
    bad = ", ".join(f"{count:,} x {reason}" for reason, count in manifest.bad_records.items())
    lines.append(f"{manifest.records:,} records read; unusable: {bad or 'none'}")
    lines += [
        f"{info.split}/{info.subset}: {info.answer_tokens:,} of its tokens are answers"
        for info in manifest.subsets
        if info.masked
    ]
    if manifest.account:
        lines += Account(**manifest.account).describe()
    unended = sum(info.unended for info in manifest.subsets)
    if unended:
        lines.append(f"{unended:,} adopted documents do not end in the end-of-text id")
    return lines + describe_duplicates(manifest) + _describe_added(manifest)


def _describe_added(manifest: Manifest) -> list[str]:
    """Subsets of ``--add-validation``, and what training shares with them."""
    lines = []
    for name, added in manifest.added.items():
        lines.append(f"validation/{name} was added later:")
        lines += [f"  {line}" for line in Account(**added["account"]).describe()]
        for shared in added["shared"]:
            warning = "warning: " if shared["groups"][1].startswith("train/") else ""
            where = " and ".join(shared["groups"])
            lines.append(f"  {warning}{shared['texts']:,} texts occur in {where}")
        if not added["shared"]:
            lines.append("  none of its texts occurs in another pair")
    return lines


def sample_texts(
    data_dir: str | Path, *, documents: int, characters: int, seed: int
) -> Iterator[tuple[str, int, str]]:
    """(split/subset, document, beginning of its decoded text) of some documents of every pair.

    Raises:
        ValueError: if the directory is not (completely) prepared.
    """
    manifest = load_manifest(data_dir)
    tokenizer = load_tokenizer(Path(data_dir))
    for info in manifest.subsets:
        dataset = IndexedDataset(prefix_of(Path(data_dir), info.group))
        order = Permutation(len(dataset), "inspect", seed)
        for number in range(min(documents, len(dataset))):
            document = order(number)
            # No token stands for more than a few characters; one for each is always enough.
            ids = dataset[document][: characters + 1]
            text = tokenizer.decode(ids.tolist(), skip_special=False)
            yield f"{info.split}/{info.subset}", document, text[:characters]


def verify(data_dir: str | Path) -> None:
    """Read everything: every id in the tokenizer's range, every document ended, contents unchanged.

    Raises:
        ValueError: naming the first pair at fault.
    """
    manifest = load_manifest(data_dir)
    eos_id = data_tokenizer(data_dir).eos_id
    for info in manifest.subsets:
        dataset = IndexedDataset(prefix_of(Path(data_dir), info.group))
        if len(dataset) != info.documents:
            raise ValueError(f"{dataset.prefix}: {len(dataset)} documents, not {info.documents}")
        dataset.check_layout()
        dataset.check_ids(manifest.tokenizer.vocab_size)
        unended = dataset.num_not_ending_in(eos_id)
        if unended != info.unended:
            raise ValueError(
                f"{dataset.prefix}: {unended:,} documents do not end in the end-of-text id "
                f"{eos_id}, the manifest knows of {info.unended:,}; adopt the pair anew (`prepare "
                "--adopt` with --add-eod or --accept-no-eod, without the manifest)"
            )
        if dataset.sha256() != info.sha256:
            raise ValueError(f"{dataset.prefix}.bin is not what `prepare` wrote")

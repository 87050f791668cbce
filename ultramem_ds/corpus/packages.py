"""What the corpus is made of: packages by name, and the subset that each one's text goes to.

A package that the machine's index does not have is named and left out, so the list may span
several releases of Debian.
"""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass
from typing import Literal, TypeAlias

Registry: TypeAlias = Literal["debian", "pypi"]


@dataclass(frozen=True, kw_only=True)
class Package:
    """One package.

    Attributes:
        names: alternatives, the first one that the registry has is taken.
        registry: where it is from.
        subset: where its text goes.
        paths: shell patterns of the files to read; empty = every file of a known kind.
    """

    names: tuple[str, ...]
    registry: Registry
    subset: str
    paths: tuple[str, ...] = ()

    def wants(self, path: str) -> bool:
        """Whether ``paths`` ask for this file."""
        return not self.paths or any(fnmatch.fnmatch(path, p) for p in self.paths)


def _debian(subset: str, *entries: str | tuple[str, tuple[str, ...]]) -> tuple[Package, ...]:
    """Packages of Debian; ``|`` separates alternatives."""
    packages = []
    for entry in entries:
        names, paths = (entry, ()) if isinstance(entry, str) else entry
        packages.append(
            Package(
                names=tuple(names.split("|")), registry="debian", subset=subset, paths=tuple(paths)
            )
        )
    return tuple(packages)


def _pypi(subset: str, names: str) -> tuple[Package, ...]:
    return tuple(
        Package(names=(name,), registry="pypi", subset=subset, paths=("*.py",))
        for name in names.split()
    )


# Not drivers and architectures, which are many times as much.
_KERNEL = tuple(
    f"linux-source-{version}/{part}/*.[ch]"
    for version in ("?.?", "?.??")
    for part in ("block", "crypto", "fs", "ipc", "kernel", "lib", "mm", "net")
)

PACKAGES: tuple[Package, ...] = (
    *_debian(
        "reference",
        "python3.11-doc|python3.13-doc",
        "postgresql-doc-15|postgresql-doc-17",
        "git-doc",
        "perl-doc",
        "octave-doc",
        "erlang-doc",
        "nodejs-doc",
        "sqlite3-doc",
        ("apache2-doc", ("*/en/*", "*.html.en")),
        "python-django-doc",
        "python-scipy-doc",
        "python-sympy-doc",
        "qtbase5-doc-html",
        "swi-prolog-doc",
        "r-doc-html",
        "exim4-doc-html",
        "postfix-doc",
        "zsh-doc",
        "bash-doc",
        "gap-doc",
        "vim-doc",
        "libreoffice-help-en-us",
        "linux-doc-6.1|linux-doc-6.12",
        "libboost1.74-doc|libboost1.83-doc",
    ),
    *_debian(
        "books",
        ("debian-handbook", ("*/en-US/*",)),
        "debian-reference-en",
        "debian-policy",
        "developers-reference",
        "maint-guide",
        "debian-faq",
        "debian-kernel-handbook",
        "debmake-doc",
        "apt-doc",
        "aptitude-doc-en",
        ("installation-guide-amd64", ("*/en/*", "*.en.html")),
        "haskell98-report",
        "haskell98-tutorial",
        "guile-3.0-doc",
        "gimp-help-en",
        "mh-book",
        ("fortunes", ("usr/share/games/fortunes/*",)),
    ),
    *_debian("dictionaries", "dict-gcide", "dict-wn", "dict-foldoc", "dict-jargon"),
    *_debian("dictionaries", "dict-vera", "dict-devil", "dict-elements"),
    *_debian("sources-c", ("linux-source-6.1|linux-source-6.12", _KERNEL)),
    *_debian("sources-go-rust", ("golang-1.19-src|golang-1.24-src", ("*.go",))),
    *_debian("sources-go-rust", ("rust-src", ("*.rs",))),
    *_pypi(
        "sources-python",
        "sympy django transformers scikit-learn pandas matplotlib networkx sqlalchemy twisted "
        "ansible-core astropy sphinx dask distributed bokeh jax statsmodels nltk biopython mypy "
        "pylint ipython scrapy",
    ),
)

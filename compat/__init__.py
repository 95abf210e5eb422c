"""The compatibility matrix: arrays that blockstore makes, read by every tool that claims to read them.

`cases` are the arrays, `readers` the tools, each of which runs in an interpreter of its own (`environments`), `limits`
what a tool is known not to do, and `matrix` reads each case with each tool and compares byte for byte with NumPy.
`page` writes what came out to docs/compatibility.md. This package itself is as light as the standard library, since
it is imported where only one tool is installed, and not blockstore.
"""

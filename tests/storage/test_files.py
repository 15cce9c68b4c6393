"""Files that appear whole or not at all."""

import os

import pytest

from mneme.storage.files import replacing


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "data.bin"
    with replacing(path) as file:
        file.write(b"first")
        assert not path.exists()

    def die_half_way():
        with replacing(path) as file:
            file.write(b"sec")
            raise RuntimeError("killed half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        die_half_way()
    assert path.read_bytes() == b"first"
    assert os.listdir(path.parent) == ["data.bin"]

from tools.rlhf.rewards.imported_files import imported_files
from tools.rlhf.rewards.spec import parse

FILES = {
    "reward.py": "import json, a\nfrom pack.inner import x\ndef f():\n    from late import y",
    "a.py": "import b, reward",
    "b.py": "",
    "late.py": "",
    "unused.py": "",
    "pack/__init__.py": "",
    "pack/inner.py": "from . import side\nfrom .deep import z\nfrom .... import too_far",
    "pack/side.py": "",
    "pack/deep/__init__.py": "z = 1",
    "pack/other.py": "",
    "torn.py": "def",
}


def test_the_files_that_a_file_imports_from_its_folder(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    expected = {"a.py", "b.py", "late.py", "pack/__init__.py", "pack/inner.py", "pack/side.py", "pack/deep/__init__.py"}
    found = imported_files(tmp_path / "reward.py")
    assert {path.relative_to(tmp_path.resolve()).as_posix() for path in found} == expected
    assert imported_files(tmp_path / "torn.py") == []
    (spec,) = parse(f"py:{tmp_path / 'reward.py'}:f")
    assert spec.files == [tmp_path / "reward.py", *found]

import subprocess
import sys

import pytest

from abq_llm.errors import AbqError
from abq_llm.locks import locked

HOLD = """
import sys, time
from pathlib import Path
from abq_llm.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_held_until_its_process_ends_however_it_ends(tmp_path):
    folder = tmp_path / "work"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(AbqError, match=r"work: another process is at work in it"), locked(folder):
            pass
        assert folder.is_dir()  # that of the other
        other.kill()
    with locked(folder):
        pass


def test_what_is_in_the_folder_stays_and_an_empty_one_goes(tmp_path):
    with locked(tmp_path / "a" / "work") as nothing:
        assert nothing is None and (tmp_path / "a" / "work").is_dir()
    assert not (tmp_path / "a" / "work").exists()
    with locked(tmp_path / "b"):
        (tmp_path / "b" / "file").write_text("x")
    assert (tmp_path / "b" / "file").read_text() == "x"

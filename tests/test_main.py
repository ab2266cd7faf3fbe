"""The command line as a person starts it: real processes, few because each takes a second."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIG = """\
defaults:
  - schema: train
  - house
  - _self_
name: hello
data: {}
tokenizer: {}
encoder: {}
conditioner: {}
lm: {num_layers: 2}
task: {}
trainer: {max_steps: 3}
logging: {}
hydra:
  run:
    dir: ${resume_or_new:logs/${name}}
"""


def start(cwd: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=120)


def saved_config(folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(CONFIG)
    return path


def with_verb(folder: Path, body: str) -> Path:
    """A program that is main.py but for a verb of our own."""
    (folder / "own_verb.py").write_text(f"def verb(cfg):\n    {body}\n")
    program = folder / "program.py"
    program.write_text(
        f"import sys\nsys.path[:0] = [{str(REPOSITORY)!r}, {str(folder)!r}]\nfrom vaura import config, launch\n"
        "config.VERBS['train'] = 'own_verb:verb'\nstatus = launch.run(sys.argv[1:])\n"
        "print('torch' in sys.modules)\nsys.exit(status)\n"
    )
    return program


def test_a_wrong_key_is_answered_at_once(tmp_path):
    """In under two seconds of processor time, from any folder, and nothing is left behind."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = start(tmp_path, str(REPOSITORY / "main.py"), f"config={saved_config(tmp_path)}", "trainer.max_stepss=3")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr == "error: unknown key 'trainer.max_stepss'. Did you mean 'trainer.max_steps'?\n"
    assert (done.returncode, done.stdout) == (2, "")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_alone_it_lists_the_configs_and_help_does_so_in_peace(tmp_path):
    alone, helped = (start(tmp_path, str(REPOSITORY / "main.py"), *argv) for argv in ([], ["--help"]))
    assert (alone.returncode, helped.returncode) == (2, 0)
    assert alone.stderr.startswith("error: say which config to run: python main.py config=PATH\n")
    assert alone.stderr.splitlines()[1:] == helped.stdout.splitlines()[1:]


def test_a_run_needs_no_torch_until_its_verb_does(tmp_path):
    program = with_verb(tmp_path, "print(cfg.lm.num_layers)")
    done = start(tmp_path, str(program), f"config={saved_config(tmp_path)}", "lm.num_layers=5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "5\nFalse\n", "")


def test_ctrl_c_says_so_in_one_line(tmp_path):
    program = with_verb(tmp_path, "print('ready', flush=True); import signal; signal.pause()")
    process = subprocess.Popen(
        [sys.executable, str(program), f"config={saved_config(tmp_path)}"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    (folder,) = (tmp_path / "logs/hello").iterdir()
    assert (process.returncode, err) == (130, f"interrupted; the same command resumes in {folder.relative_to(tmp_path)}\n")


def test_a_defect_keeps_its_traceback(tmp_path):
    program = with_verb(tmp_path, "raise ValueError('ours')")
    done = start(tmp_path, str(program), f"config={saved_config(tmp_path)}")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("ValueError: ours")

"""A rank that dies or hangs ends the job with its name; the state is kept, and the same command resumes."""

import signal
import time

from tests.tools.rlhf.dying_rank import REWARD


def test_it_is_named_and_the_run_resumes(world, process, tmp_path):
    """Of PPO; GRPO has the same launcher and the same watch, and `test_every_fault.py` looks at the phases that it passes."""
    order, rewards = tmp_path / "order", tmp_path / "rewards.py"
    rewards.write_text(REWARD.format(order=str(order)))
    flags = {
        "source": world.policy, "prompts": world.prompts, "reward": f"py:{rewards}:reds", "target": tmp_path / "out",
        "steps": 40, "max_new_tokens": 4, "rollout_batch_size": 8, "global_batch_size": 8, "micro_batch_size": 4, "epochs": 1,
        "save_every": 1, "processes": 2, "shared_critic": True, "rollout_micro_batch_size": 3,
    }  # fmt: skip
    for fault, said in ((signal.SIGKILL, "worker 1 was killed by SIGKILL"), (signal.SIGSTOP, "rank 1 hangs: for ")):
        order.write_text(str(int(fault)))
        done = process("ppo", **flags, hang_timeout=4)
        assert time.time() - float(order.read_text()) < 60
        order.unlink()
        assert done.returncode == 1, done.stderr
        assert said in done.stderr
        assert not (tmp_path / "out").exists()
        # Whole ones. A rank that is stopped goes on while its stack is read, for some updates more.
        saved = [int(path.name.removeprefix("step_")) for path in (tmp_path / "out.state").glob("step_*[0-9]")]
        assert saved[0] == 1 if fault == signal.SIGKILL else 2 <= saved[0] < 40
    assert "resuming after iteration 1" in done.stderr
    assert "'update 3: rewards'" in done.stderr  # where it hangs

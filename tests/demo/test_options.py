import pytest

from shardckpt.demo.__main__ import main, parse_options
from shardckpt.demo.messages import Mesh


def test_no_arguments_are_needed():
    options = parse_options([])
    assert options.mesh == Mesh(2, 2)
    assert options.others == (Mesh(1, 2), Mesh(1, 1))
    assert options.save_every < options.kill_at < options.training.steps


@pytest.mark.parametrize(
    ("steps", "every", "kill_at"),
    [(18, 3, 12), (24, 4, 16), (6, 2, 4), (100, 10, 60), (5, 2, 4), (7, 3, 6)],
)
def test_the_default_kill_is_in_a_save_that_is_not_the_first_and_before_the_end(steps, every, kill_at):
    options = parse_options(["--steps", str(steps), "--save-every", str(every)])
    assert options.kill_at == kill_at


def test_meshes_are_data_by_tensor_parallel():
    options = parse_options(["--mesh", "4x1", "--others", "2x2,1x4"])
    assert options.mesh == Mesh(dp=4, tp=1)
    assert options.others == (Mesh(dp=2, tp=2), Mesh(dp=1, tp=4))
    assert parse_options(["--others", "none"]).others == ()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--mesh", "4"], "'4' is not a mesh: write it like 2x1"),
        (["--mesh", "0x2"], "'0x2' is not a mesh"),
        (["--others", "1x1,2"], "'2' is not a mesh"),
        (["--steps", "0"], "'0' is not a number from 1 on"),
        (["--mesh", "3x1"], "--batch 8 cannot be divided among dp 3"),
        (["--others", "1x3"], "8 heads, which cannot be divided among tp 3"),
        (["--kill-at", "5"], "the kill at step 5 must be in a save"),
        (["--kill-at", "3"], "not the first one"),
        (["--kill-at", "18"], "before the last step (18)"),
        (["--steps", "3"], "more --steps"),
        (["--text", "no/such/file"], "there is no such file"),
        (["--size", "huge"], "invalid choice: 'huge'"),
        (["--tolerance", "nan"], "'nan' is not a number above 0"),
        (["--deadline", "0"], "'0' is not a number above 0"),
        (["--s3", "--root", "s3://bucket/runs"], "--s3 starts a server of its own, so it takes no --root"),
    ],
)
def test_a_wrong_option_says_what_to_do_and_starts_nothing(argv, says, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(argv)
    assert exit_info.value.code == 2
    assert says in " ".join(capsys.readouterr().err.split())

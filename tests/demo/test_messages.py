import math

import pytest

from shardckpt.demo.messages import (
    Built,
    Failed,
    Finished,
    Job,
    Listener,
    Mesh,
    Reporter,
    Resumed,
    Run,
    Saved,
    Started,
    Stepped,
    Training,
    Writing,
)

EVENTS = [
    Started(rank=3, pid=77),
    Built(run="reference", parameters=10, text_nbytes=20, device="cpu"),
    Stepped(run="reference", step=1, loss=0.1 + 0.2),
    Saved("interrupted", 4, 100, stall_s=0.1, stage_s=0.2, write_s=0.3, commit_s=0.4, total_s=0.5),
    Writing(step=16, key="step_16.ab.tmp/rank_3.pt"),
    Resumed(step=12, committed=[4, 8, 12], skipped=[], elapsed_s=1.5),
    Finished(run="resumed", committed=[4]),
    Failed(rank=1, message="OSError: no"),
]


def test_a_job_comes_back_from_its_file_as_it_was(tmp_path):
    job = Job(
        training=Training(size="tiny", steps=6, batch=4, seed=1, text=None),
        mesh=Mesh(2, 1),
        runs=(Run(name="reference"), Run(name="interrupted", save_every=2, stall_at=4)),
        root="memory://x",
        events="events",
        deadline_s=10.0,
    )
    job.write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json") == job


def test_every_event_arrives_as_it_was_sent(tmp_path):
    path = str(tmp_path / "events")
    listener = Listener(path)
    with Reporter(path) as one, Reporter(path) as other:
        for i, event in enumerate(EVENTS):
            (one if i % 2 else other).tell(event)
    assert list(listener.new_events()) == EVENTS
    assert list(listener.new_events()) == []


@pytest.mark.parametrize("loss", [1 / 3, math.nextafter(2.5, 3), 5e-324, math.inf])
def test_a_loss_arrives_bit_for_bit(loss, tmp_path):
    path = str(tmp_path / "events")
    with Reporter(path) as reporter:
        reporter.tell(Stepped(run="resumed", step=1, loss=loss))
    (event,) = Listener(path).new_events()
    assert isinstance(event, Stepped)
    assert event.loss.hex() == loss.hex()


def test_a_line_that_is_half_written_waits_for_its_end(tmp_path):
    path = tmp_path / "events"
    listener = Listener(str(path))
    assert list(listener.new_events()) == []
    with Reporter(str(path)) as reporter:
        reporter.tell(EVENTS[0])
    line = path.read_bytes()
    path.write_bytes(line[:10])
    assert list(listener.new_events()) == []
    path.write_bytes(line)
    assert list(listener.new_events()) == EVENTS[:1]

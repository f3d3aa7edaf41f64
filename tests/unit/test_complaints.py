"""The same trouble is told rarely, another at once."""

from consul_backend.complaints import Complaint


def test_it_is_told_at_first_and_then_more_and_more_rarely():
    complaint = Complaint()
    told = [time for time in range(1, 5000) if complaint.due(OSError("away"))]
    assert told == [1, 4, 16, 64, 256, 1024, 4096]
    assert complaint.times == 4999


def test_another_trouble_and_one_that_comes_back_are_told_at_once():
    complaint = Complaint()
    assert [complaint.due(text) for text in ("a", "a", "b", "b", "a")] == [True, False, True, False, True]
    assert complaint.over()
    assert not complaint.over()
    assert complaint.times == 0
    assert complaint.due("a")

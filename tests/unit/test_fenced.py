"""A transaction beside the log says which of its guards was refused, and never lets a stranger's through."""

import pytest

from consul_backend import fenced
from consul_backend.errors import Conflict, FenceLost, OpFailure, OutcomeUnknown, StoreWentBack
from consul_backend.fenced import GUARD_OPS, fenced_idempotent, fenced_txn, guards, require_tenure
from consul_backend.physical import EPOCH_KEY, LOCK_KEY, Item, TxnResult
from consul_backend.tenure import Tenure
from consul_backend.txn import CheckIndex, CheckSession, Delete, Set

SESSION = "7f1a6ad5-6a5f-4b1c-9c7e-0d3c1a2b3c4d"
TENURE = Tenure(3, "node-1", SESSION, 41)
NEWEST = CheckIndex("g/1/wal/1", 40)
OPS = [Set("a", b"1"), Delete("b")]


class Store:
    """Answers with what it is told to, the last answer again and again."""

    def __init__(self, *answers, items=()):
        self.answers = list(answers)
        self.items = list(items)
        self.sent = []

    async def txn(self, ops):
        self.sent.append(list(ops))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def get_many(self, keys, *, consistent=False):
        assert keys == [LOCK_KEY, EPOCH_KEY]
        assert consistent
        return self.items


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(fenced, "_PAUSE_S", 0)


def refused(*positions):
    return Conflict("refused", tuple(OpFailure(position, f"failure {position}") for position in positions))


@pytest.mark.parametrize("newest", [None, NEWEST])
async def test_the_guards_go_first(newest):
    done = TxnResult(7)
    store = Store(done)
    assert await fenced_txn(store, TENURE, OPS, newest and (lambda: newest)) is done
    fence = [CheckSession(LOCK_KEY, SESSION), CheckIndex(EPOCH_KEY, 41)]
    assert guards(TENURE) == fence
    assert store.sent == [[*fence, *([newest] if newest else []), *OPS]]
    assert len(store.sent[0]) - len(OPS) <= GUARD_OPS == 3


@pytest.mark.parametrize(
    ("newest", "positions", "error"),
    [
        (None, (0,), FenceLost),
        (None, (1,), FenceLost),
        (None, (3, 1), FenceLost),
        (None, (2,), Conflict),
        (NEWEST, (1, 2), FenceLost),
        (NEWEST, (2,), StoreWentBack),
        (NEWEST, (4, 2), StoreWentBack),
        (NEWEST, (3,), Conflict),
        (NEWEST, (), Conflict),
        (None, (), Conflict),
    ],
)
async def test_which_guard_was_refused_says_why(newest, positions, error):
    with pytest.raises(error) as caught:
        await fenced_txn(Store(refused(*positions)), TENURE, OPS, newest and (lambda: newest))
    assert type(caught.value) is error


@pytest.mark.parametrize("went_back", [False, True])
async def test_a_record_that_was_newest_when_this_was_sent_may_be_collected(went_back):
    """Then the log has gone on, and the newest of now is asked about; a store that went back has no such one."""
    later = CheckIndex("g/1/wal/9", 48)
    told = iter([NEWEST, later, later, later])
    store = Store(refused(2), refused(2) if went_back else TxnResult(5))
    if went_back:
        with pytest.raises(StoreWentBack):
            await fenced_txn(store, TENURE, OPS, lambda: next(told))
    else:
        assert await fenced_txn(store, TENURE, OPS, lambda: next(told)) == TxnResult(5)
    assert [ops[2] for ops in store.sent] == [NEWEST, later]


async def test_a_repeated_deletion_asks_about_the_newest_record_of_its_moment():
    later = CheckIndex("g/1/wal/9", 48)
    told = iter([NEWEST, later])
    store = Store(OutcomeUnknown("lost"), TxnResult(1))
    await fenced_idempotent(store, TENURE, OPS, lambda: next(told))
    assert [ops[2] for ops in store.sent] == [NEWEST, later]


@pytest.mark.parametrize(("newest", "first"), [(None, 2), (NEWEST, 3)])
async def test_positions_of_a_refusal_count_from_the_operations(newest, first):
    with pytest.raises(Conflict) as caught:
        await fenced_txn(Store(refused(first, first + 1)), TENURE, OPS, newest and (lambda: newest))
    assert caught.value.failures == (OpFailure(0, f"failure {first}"), OpFailure(1, f"failure {first + 1}"))


LOCK = Item(LOCK_KEY, b"", 40, SESSION)
EPOCH = Item(EPOCH_KEY, b"3", 41)


async def test_a_tenure_that_holds_is_found_to_hold():
    await require_tenure(Store(items=[LOCK, EPOCH]), TENURE)


@pytest.mark.parametrize(
    "items",
    [
        [None, EPOCH],
        [Item(LOCK_KEY, b"", 40, ""), EPOCH],
        [LOCK, None],
        [LOCK, Item(EPOCH_KEY, b"3", 42)],
        [LOCK, Item(EPOCH_KEY, b"3", 40)],
    ],
)
async def test_a_tenure_that_ended_is_found_to_have_ended(items):
    with pytest.raises(FenceLost):
        await require_tenure(Store(items=items), TENURE)


async def test_a_deletion_without_an_answer_is_sent_again_five_times_at_most():
    store = Store(OutcomeUnknown("lost"), OutcomeUnknown("lost"), TxnResult(1))
    await fenced_idempotent(store, TENURE, OPS, lambda: NEWEST)
    assert len(store.sent) == 3
    assert store.sent[0] == store.sent[2]
    assert NEWEST in store.sent[0]
    store = Store(OutcomeUnknown("lost"))
    with pytest.raises(OutcomeUnknown):
        await fenced_idempotent(store, TENURE, OPS)
    assert len(store.sent) == 5
    store = Store(TxnResult(1))
    await fenced_idempotent(store, TENURE, OPS)
    assert len(store.sent) == 1

"""Questions of training, and those held out."""

from real import facts


def test_no_question_is_on_both_sides() -> None:
    known, apart = facts.training(), facts.held_out()
    questions = {question.casefold() for question, _, _ in known}
    assert len(questions) == len(known) >= 300
    assert len(set(apart)) == len(apart) == 40
    assert not questions & {question.casefold() for question in apart}
    assert {confidence for _, _, confidence in known} == {"high", "medium", "low"}

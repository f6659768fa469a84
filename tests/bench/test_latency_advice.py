"""Which mode is advised, on made-up figures."""

from __future__ import annotations

from relod.bench.latencyadvice import ModeFacts, advise

LOCAL = {"mode": "local-only", "cycle_ms": 45.0, "steps": 440, "cycle_left": 0.78, "updates_per_s": 8.0}
NEAR = {"mode": "remote-local", "cycle_ms": 45.0, "steps": 440, "cycle_left": 0.81, "updates_per_s": 24.6}
FAR = {"mode": "remote-only", "cycle_ms": 45.0, "steps": 440, "cycle_left": 0.4, "updates_per_s": 25.0}
FAR |= {"answer_ms": (12.0, 21.0)}


def advice(*modes, link=None, learner=None):
    return advise([ModeFacts(**mode) for mode in modes], link=link, learner=learner)


def test_the_one_that_learns_fastest_is_advised():
    said = advice(LOCAL, NEAR | {"policy_age_ms": 400.0}, learner="ws://strong:8765")
    assert said.startswith(
        "Use remote-local on this machine, with ws://strong:8765: it kept every deadline of 45 ms with 81 % of the "
        "cycle left at the 99th percentile, learned with 24.6 updates/s and acted by policies 0.4 s old."
    )
    assert "local-only kept its deadlines too" in said
    assert "8 updates/s" in said


def test_of_two_that_learn_alike_the_one_with_less_between_is_advised():
    assert advice(FAR, NEAR).startswith("Use remote-local ")
    assert advice(FAR, NEAR, LOCAL | {"updates_per_s": 23.0}).startswith("Use local-only ")
    assert advice(FAR | {"updates_per_s": 30.0}, NEAR).startswith("Use remote-only ")


def test_the_round_trip_is_named_as_the_price_of_remote_only():
    price = "Each of its actions waits for a round trip: 12.0 ms (median), 21.0 ms (p99)."
    assert price in advice(NEAR, FAR)
    assert price in advice(FAR)
    assert "round trip" not in advice(NEAR, LOCAL)


def test_a_mode_that_misses_deadlines_is_not_to_be_used():
    said = advice(
        LOCAL, NEAR | {"overruns": 3}, FAR | {"late_actions": 57, "answer_ms": (20.0, 83.0)}, link="wifi-busy"
    )
    assert said.startswith("Use local-only on this machine and link (wifi-busy): ")
    assert "remote-local is not to be used: 3 of its 440 cycles overran." in said
    late = "remote-only is not to be used: 57 of 440 actions came after the next deadline; "
    assert late + "an answer took 20.0 ms (median), 83.0 ms (p99) of a cycle of 45 ms." in said


def test_when_all_miss_the_closest_is_named():
    said = advice(LOCAL | {"overruns": 9}, NEAR | {"overruns": 2, "late_actions": 1})
    assert said.startswith("No mode kept all deadlines on this machine; remote-local came closest.")
    assert said.count("not to be used") == 2
    assert "2 of its 440 cycles overran and 1 of 440 actions" in said


def test_the_machine_is_blamed_for_what_held_up_an_idle_process():
    said = advice(LOCAL | {"shared_overruns": 2, "sentinel_ms": 24.3})
    assert "every deadline of 45 ms but 2, for which an idle process was late as well," in said
    assert said.endswith("woke 24.3 ms late (p99); measure again when it is quiet.")
    assert "busy" not in advice(LOCAL | {"sentinel_ms": 2.0})


def test_what_failed_is_named():
    failed = {"mode": "remote-only", "error": "no learner at ws://there"}
    assert "remote-only could not be measured: no learner at ws://there." in advice(LOCAL, failed)
    assert advice(failed) == "No mode could be measured here, so there is nothing to advise."


def test_no_update_is_said():
    assert "but the learner made no update" in advice(LOCAL | {"updates_per_s": None})


def test_a_stronger_learner_is_thought_of():
    hint = "a stronger learner elsewhere is measured with --learner"
    assert hint in advice(LOCAL, NEAR)
    assert hint not in advice(LOCAL)
    assert hint not in advice(LOCAL, NEAR, learner="ws://strong:8765")

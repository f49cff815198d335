"""Faults of the training half, planted by benchmarks/planted.py: (name, file, old text, new text, tests)."""

UPDATES = "tests/unit/test_schedules_and_ema.py"

FAULTS = [
    (
        "the average moves away from the generator",
        "dist_gan/ema.py",
        "weight = 1.0 - 0.5 ** (images / half_life) if",
        "weight = 0.5 ** (images / half_life) if",
        (f"{UPDATES}::test_two_half_lives_leave_a_quarter_and_the_average_goes_towards_the_new",),
    ),
    (
        "a ramp does not count from its beginning",
        "dist_gan/schedules.py",
        "max(images - knob.begin, 0)",
        "max(images, 0)",
        (f"{UPDATES}::test_a_ramp_that_begins_later_holds_its_start_until_then",),
    ),
]

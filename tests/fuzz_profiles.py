# SPDX-License-Identifier: Apache-2.0
"""How long the fuzz tests search, by the environment variable HYPOTHESIS_PROFILE.

`ci`, the default, tries the same examples everywhere, few enough for 90 seconds of CPU a file. `long` tries 40 times as
many, others in each run, and those first that failed in the run before.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

LONGER = 40

# A kernel in the interpreter or a trace takes what it takes, and the fixtures hold nothing that an example changes.
_COMMON = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    "print_blob": True,
}
_SHRINK = [
    Phase.explicit,
    Phase.generate,
    Phase.shrink,
]  # without Phase.explain, which runs what failed again and again
settings.register_profile("ci", derandomize=True, database=None, phases=_SHRINK, **_COMMON)
settings.register_profile("long", phases=[Phase.reuse, *_SHRINK], **_COMMON)
# By hand, where shrinking would take too long: as few as `ci`, others in each run, and the first that fails as it is.
settings.register_profile("unshrunk", database=None, phases=[Phase.explicit, Phase.generate], **_COMMON)

PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")
settings.load_profile(PROFILE)


def examples(in_ci: int) -> settings:
    """Decorator: as many examples of a test in CI, and `LONGER` times as many in the profile `long`."""
    return settings(max_examples=in_ci * (LONGER if PROFILE == "long" else 1))

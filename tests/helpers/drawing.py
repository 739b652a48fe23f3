"""How many examples hypothesis draws: few, and the same each time; or with the profile `fuzz` many, and new ones."""

from hypothesis import HealthCheck, settings

FEW, FIXED, FUZZ = 10, 100, 2000
settings.register_profile("few", max_examples=FEW, deadline=None, derandomize=True)
settings.register_profile("fixed", max_examples=FIXED, deadline=None, derandomize=True)
settings.register_profile("fuzz", max_examples=FUZZ, deadline=None, print_blob=True)
settings.load_profile("fixed")


def examples(count: int) -> settings:
    """For a test that takes long: this many examples, and in proportion more with `fuzz`. Fixtures that don't depend
    on what is drawn may serve all of them."""
    share = settings().max_examples / FIXED
    return settings(
        max_examples=round(count * share), suppress_health_check=[HealthCheck.function_scoped_fixture]
    )

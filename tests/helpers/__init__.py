"""What several test files share. A test file imports from here, from no other test file and not from conftest."""

from pathlib import Path

import pytest

# a helper's failed assertion shows its values, as a test's does
pytest.register_assert_rewrite(*(f"{__name__}.{path.stem}" for path in Path(__file__).parent.glob("[a-z]*.py")))

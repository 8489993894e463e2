# SPDX-License-Identifier: Apache-2.0
"""As for tests/kernels: ops run their kernels on the GPU if there is one, and what these tests share imports kernels."""

from tests.kernels.conftest import _interpreted, device, pytest_collection_finish  # noqa: F401

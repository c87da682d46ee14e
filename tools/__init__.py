"""Tools for developers of the library, run from the repository; not part of the wheel."""

"""What developers of the library run from the repository; no part of the wheel."""

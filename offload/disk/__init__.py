"""The tier on disk: extent files in one folder, checked and bounded, that outlive the process."""

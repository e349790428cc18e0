"""The tier on disk: extent files in one folder, checked, bounded, and outliving the process."""

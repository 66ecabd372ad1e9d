"""What is in C. The sources lie beside it, a directory for each extension."""

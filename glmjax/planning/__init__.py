"""What can be known of a program before there is hardware to run it on."""

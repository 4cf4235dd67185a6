"""`python -m minidora`: the command, where its name is not found."""

from minidora_command import main

main()

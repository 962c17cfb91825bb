"""What `launch/` starts: the GRPO and SFT loops, an evaluation of a finished run, and what they set up and leave."""

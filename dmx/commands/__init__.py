"""The sub-commands of `dmx`, one module each: SUMMARY, add_arguments(parser) and run(args)."""

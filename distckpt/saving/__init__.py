"""capture -> agree -> divide -> image -> write -> commit. Read in that order: agree, divide, image, commit, save."""

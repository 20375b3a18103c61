"""Tables, figures and the report page, made from the files of experiment folders. No torch in here."""

//! Names, arguments, paths: bytes without NUL. In JSON a string where they are UTF-8, else an array of numbers.

use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Text {
    Utf8(String),
    Bytes(Vec<u8>),
}

impl Text {
    pub fn of(name: &OsStr) -> Self {
        match name.to_str() {
            Some(text) => Text::Utf8(text.to_owned()),
            None => Text::Bytes(name.as_bytes().to_vec()),
        }
    }

    pub fn path(&self) -> &Path {
        Path::new(self.as_ref())
    }
}

impl AsRef<OsStr> for Text {
    fn as_ref(&self) -> &OsStr {
        match self {
            Text::Utf8(text) => OsStr::new(text),
            Text::Bytes(bytes) => OsStr::from_bytes(bytes),
        }
    }
}

impl From<Text> for OsString {
    fn from(text: Text) -> OsString {
        match text {
            Text::Utf8(text) => text.into(),
            Text::Bytes(bytes) => OsString::from_vec(bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_come_through_json() {
        for (json, text) in [(r#""é""#, Text::Utf8("é".into())), ("[255,1]", Text::Bytes(vec![255, 1]))] {
            assert_eq!(serde_json::from_str::<Text>(json).unwrap(), text);
            assert_eq!(serde_json::to_string(&text).unwrap(), json);
            assert_eq!(Text::of(text.as_ref()), text);
        }
        assert!(serde_json::from_str::<Text>("[256]").is_err());
    }
}

package api

import (
	"bytes"
	"encoding/json"
	"unicode/utf8"
)

// Word is a word as the kernel takes it: any bytes but NUL. JSON has text only and would
// quietly replace what is not UTF-8, such as an old file name; so that becomes
// {"base64": "..."}, and everything else a string.
type Word string

// Words are a list of them.
type Words []string

// binary is a Word that is not UTF-8.
type binary struct {
	Base64 []byte `json:"base64"`
}

// MarshalJSON implements json.Marshaler.
func (w Word) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(w)) {
		return json.Marshal(string(w))
	}
	return json.Marshal(binary{[]byte(w)})
}

// UnmarshalJSON implements json.Unmarshaler.
func (w *Word) UnmarshalJSON(b []byte) error {
	if !bytes.HasPrefix(b, []byte("{")) {
		return json.Unmarshal(b, (*string)(w))
	}
	var v binary
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(&v)
	*w = Word(v.Base64)
	return err
}

// MarshalJSON implements json.Marshaler.
func (w Words) MarshalJSON() ([]byte, error) {
	list := make([]Word, len(w))
	for i, s := range w {
		list[i] = Word(s)
	}
	return json.Marshal(list)
}

// UnmarshalJSON implements json.Unmarshaler.
func (w *Words) UnmarshalJSON(b []byte) error {
	var list []Word
	if err := json.Unmarshal(b, &list); err != nil {
		return err
	}
	*w = make(Words, len(list))
	for i, s := range list {
		(*w)[i] = string(s)
	}
	return nil
}
